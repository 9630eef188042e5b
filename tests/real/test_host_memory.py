"""Host memory: what left a replica's KV cache is restored by every replica, also when its engine is gone."""

import asyncio
import mmap
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import openai
import pytest

from bench.continuity import Stream, stream
from engine.host_process.kept_memory import VARIABLE, KeptMemories, encode_kept
from gateway.tenants.salts import tenant_salt
from tests.real.conftest import CONFIG, ONE, TWO, VLLM_ARGS, running
from tests.real.families.engines import Family, tokens
from tests.real.fleet import RESTART_SECONDS_MAX, SALT_SECRET, Answer, Fleet, answer_of, until
from tests.real.prompts import Words
from tests.real.small_caches import BLOCK, LENGTH, SMALL, WHOLE, chain_of, push_out, restoring
from transport.backends.shared_memory import open_region
from transport.keys import chain_keys, root_key
from transport.table.group_look_up import held_tokens
from transport.table.quality import CODED, IN_CODE, LOSSY
from transport.table.tiers import host_memory_of

TIER = host_memory_of("replica-0")
STREAMED = 100
"""Tokens of a stream that is cut."""


@pytest.fixture(scope="module")
def words(tiered) -> Words:
    return Words(tiered.model_dir)


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    """A directory in shared memory."""
    with tempfile.TemporaryDirectory(prefix="peerkv-kept-", dir="/dev/shm") as directory:
        yield Path(directory)


def fleet_of(files: Path) -> Fleet:
    """A fleet with small KV caches and much host memory, in named files; tenant two accepts loss."""
    flags = ("--host-memory", "400MiB", "--host-memory-dir", str(files), "--lossy", "int8")
    return Fleet(CONFIG, flags=flags, vllm_args=(*VLLM_ARGS, *SMALL), key=ONE.api_key.get_secret_value())


@pytest.fixture(scope="module")
def tiered(files) -> Iterator[Fleet]:
    with running(fleet_of(files)) as fleet:
        yield fleet


def tier_stats(fleet: Fleet, replica: str = "replica-0") -> dict:
    return next(tier for tier in fleet.stats()["host_memory"] if tier["replica"] == replica)


def test_what_left_a_cache_is_restored_there_and_elsewhere_to_the_last_bit(tiered, words):
    prompt = words.ids(LENGTH)
    cold, local = (tiered.answer(prompt, replica="replica-0") for _ in range(2))
    assert (cold.cached_tokens, local.cached_tokens) == (0, WHOLE)
    push_out(tiered, words, "replica-0")
    with restoring(tiered, "replica-0", "host_memory"):
        restored = tiered.answer(prompt, replica="replica-0")
    assert restored.same_as(local)
    push_out(tiered, words, "replica-0")
    with restoring(tiered, "replica-1", "host_memory"):
        elsewhere = tiered.answer(prompt, replica="replica-1")
    assert elsewhere.same_as(local)
    assert restored.close_to(cold)
    seen = tier_stats(tiered)
    assert seen["stores"] > 2 * WHOLE // BLOCK
    assert (seen["imports"], seen["import_blocks"], seen["import_failures"]) == (2, 2 * WHOLE // BLOCK, 0)
    assert seen["dropped_blocks"] == 0
    assert f'peerkv_host_memory_import_blocks_total{{replica="replica-0"}} {2.0 * (WHOLE // BLOCK)}' in metrics(tiered)


def test_who_accepts_loss_gets_back_what_was_coded_and_stays_apart_from_who_does_not(tiered, words):
    ids, key = words.choices(LENGTH, "with loss"), TWO.api_key.get_secret_value()

    def asked(quality: str, replica: str) -> Answer:
        headers = tiered.headers(key) | {"x-peerkv-replica": replica, "x-peerkv-quality": quality}
        return answer_of(tiered.client.post("/v1/completions", json=tiered.body(ids), headers=headers))

    cold = asked("lossy", "replica-0")
    push_out(tiered, words, "replica-0")
    with restoring(tiered, "replica-0", "host_memory"):
        restored = asked("lossy", "replica-0")
    assert (cold.cached_tokens, restored.cached_tokens) == (0, WHOLE)
    assert restored.logprobs != cold.logprobs
    assert abs(restored.logprobs[0] - cold.logprobs[0]) < 0.1
    exact = asked("exact", "replica-1")
    assert exact.cached_tokens == 0
    assert exact.close_to(cold)
    with closing(tiered.table(TIER)) as table:
        in_codes = [int(state) for state in table.states() if not state & 1 and state & IN_CODE]
        assert len(in_codes) >= WHOLE // BLOCK
        assert all(state & CODED and state & LOSSY for state in in_codes)


def metrics(fleet: Fleet) -> str:
    return fleet.client.get("/metrics").raise_for_status().text


def test_a_replica_with_nothing_to_do_stores_what_it_would_give_away_next(tiered, words):
    tiered.answer(words.ids(8 * BLOCK - 2), replica="replica-0", max_tokens=1)
    before = tier_stats(tiered)["ahead_blocks"]
    tiered.answer(words.ids(LENGTH), replica="replica-0", max_tokens=1)
    until(lambda: tier_stats(tiered)["ahead_blocks"] >= before + WHOLE // BLOCK, 20, "the last prompt is stored")


def test_the_end_of_a_prefix_is_restored_behind_what_is_still_there(tiered, words):
    prompt = words.ids(LENGTH)
    tiered.answer(prompt, replica="replica-0")
    local = tiered.answer(prompt, replica="replica-0")
    tiered.answer(words.ids(6 * BLOCK - 2), replica="replica-0", max_tokens=1)
    tiered.answer(words.ids(10 * BLOCK - 2), replica="replica-0", max_tokens=1)  # takes the last blocks of the prompt
    before = tiered.replica_stats("replica-0")["tokens"]
    restored = tiered.answer(prompt, replica="replica-0")
    after = tiered.replica_stats("replica-0")["tokens"]
    assert after["local"] > before["local"]
    assert after["host_memory"] > before["host_memory"]
    assert after["computed"] - before["computed"] == LENGTH - WHOLE
    assert restored.same_as(local)


def test_tenants_and_changed_bytes_are_misses(tiered, words):
    prompt = words.ids(LENGTH)
    cold = tiered.answer(prompt, replica="replica-0")
    push_out(tiered, words, "replica-0")
    foreign = tiered.answer(prompt, replica="replica-0", key=TWO.api_key.get_secret_value())
    assert foreign.cached_tokens == 0
    assert foreign.close_to(cold)
    damage(tiered, prompt, block=3)
    failures = tiered.replica_stats("replica-1")["counts"]["check_failures"]
    with restoring(tiered, "replica-1", "host_memory", 3 * BLOCK):
        assert tiered.answer(prompt, replica="replica-1").close_to(cold)
    assert tiered.replica_stats("replica-1")["counts"]["check_failures"] == failures + 1


def damage(fleet: Fleet, prompt: list[int], block: int) -> None:
    """Change one bit of a stored block."""
    with closing(fleet.table(TIER)) as table:
        root = root_key(table.fingerprint, tenant_salt(SALT_SECRET.encode(), ONE.name))
        run = table.longest_run(chain_keys(root, prompt, BLOCK))
        assert len(run) == LENGTH // BLOCK
        memory = table.memories[0]
        place = memory.layers[5].offset + int(run.block_ids[block]) * memory.layers[5].stride + 77
        fd = open_region(memory.regions[0], writable=True)
        try:
            with mmap.mmap(fd, memory.regions[0].size) as mapped:
                mapped[place] ^= 1
        finally:
            os.close(fd)


def test_a_killed_engines_blocks_are_restored_by_others_and_then_by_itself(tiered, words):
    """Close, not the same to the last bit: canaries of a replaced replica may be in the same step, which rounds otherwise."""
    prompt = words.ids(LENGTH)
    tiered.answer(prompt, replica="replica-0")
    local = tiered.answer(prompt, replica="replica-0")
    push_out(tiered, words, "replica-0")
    former = tiered.pid("replica-0")
    os.kill(former, signal.SIGKILL)
    with restoring(tiered, "replica-1", "host_memory"):
        assert tiered.answer(prompt, replica="replica-1").close_to(local, 1e-4)
    until(lambda: tiered.restarted("replica-0", former), RESTART_SECONDS_MAX, "replica-0 is started anew")
    tiered.wait_ready(RESTART_SECONDS_MAX)
    tiered.forget("replica-1")
    with restoring(tiered, "replica-0", "host_memory"):
        assert tiered.answer(prompt, replica="replica-0").close_to(local, 1e-4)
    tiered.flush()
    with restoring(tiered, "replica-0", "host_memory", 0):
        tiered.answer(prompt, replica="replica-0")


def test_the_rest_of_a_killed_engines_stream_is_made_behind_what_its_host_memory_kept(tiered, words):
    prompt, request_id = words.text(LENGTH), uuid.uuid4().hex
    tiered.answer(prompt, replica="replica-0")
    push_out(tiered, words, "replica-0")
    tiered.answer(prompt, replica="replica-0")  # restored: the replica has it, and its host memory too

    async def main() -> tuple[Stream, Stream]:
        begun = asyncio.Event()
        async with openai.AsyncOpenAI(base_url=f"{tiered.url}/v1", api_key=tiered.key, max_retries=0) as client:
            asking = client.with_options(default_headers={"x-request-id": request_id})
            cut = asyncio.create_task(stream(asking, "completions", prompt, STREAMED, begun, tiered.model))
            await begun.wait()
            os.kill(former, signal.SIGKILL)
            return await cut, await stream(client, "completions", prompt, STREAMED, model=tiered.model)

    former, before = tiered.pid("replica-0"), tiered.stats()["gateway"]["streams_continued"]
    cut, whole = asyncio.run(main())
    assert cut.replica == "replica-0"
    assert cut.same_as(whole)
    assert tiered.stats()["gateway"]["streams_continued"] == before + 1
    first, rest = tiered.client.get(f"/kv/explain/{request_id}").raise_for_status().json()["attempts"]
    (delivered,) = rest["delivered"]
    assert (first["replica"], rest["replica"], delivered["source"]) == ("replica-0", "replica-1", TIER)
    assert (delivered["local_tokens"], delivered["failed_blocks"]) == (0, 0)
    assert WHOLE <= delivered["peer_tokens"] < rest["prompt_tokens"]
    tiered.wait_ready(RESTART_SECONDS_MAX)


def test_it_says_what_it_keeps(tiered):
    assert "host memory 400 MiB" in Path(tiered.home / "peerkv.log").read_text()
    assert tier_stats(tiered)["blocks"] * tier_stats(tiered)["bytes"] > 0


def test_after_everything_was_started_anew_named_files_give_it_back(tiered, words, files):
    """The last test of `tiered`: it ends that."""
    prompt = words.ids(LENGTH)
    tiered.answer(prompt, replica="replica-0")
    local = tiered.answer(prompt, replica="replica-0")
    push_out(tiered, words, "replica-0")
    assert tiered.stop() == 0
    with running(fleet_of(files)) as fleet, restoring(fleet, "replica-1", "host_memory"):
        assert fleet.answer(prompt, replica="replica-1").close_to(local, 1e-4)


def test_states_are_restored_and_outlive_their_engine(tmp_path):
    family = Family(tmp_path, "qwen3next", dtype="bfloat16", max_model_len=2048, num_gpu_blocks_override=20)
    family.tables.mkdir(mode=0o700)
    kept = KeptMemories(family.tables).keep("a", 64 << 20)
    try:
        family.start("a", environment={VARIABLE: encode_kept(kept)})
        block = family.block()
        ids, whole = tokens(2 * block + 3, 1), 2 * block
        cold, local = family.ask("a", ids), family.ask("a", ids)
        assert (cold.cached, local.cached) == (0, whole)
        with closing(family.table("a")) as table:
            for seed in range(2, 4 + table.num_blocks // 5):  # each takes a block of three states, and two of keys and values
                family.ask("a", tokens(whole + 3, seed))
            assert held_tokens(table, chain_of(table, ids)) == 0
        with family.counting("a") as counted:
            restored = family.ask("a", ids)
        assert (counted["tier_tokens_host_memory"], counted["check_failures"]) == (whole, 0)
        assert restored.same_as(local)
        family.kill("a")
        family.start("b")
        with family.counting("b") as counted:
            elsewhere = family.ask("b", ids)
        assert counted["tier_tokens_host_memory"] == whole
        assert elsewhere.same_as(local)
    finally:
        family.close()
