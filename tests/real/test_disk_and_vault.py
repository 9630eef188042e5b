"""Disk and vault: what left every memory is restored to the last bit, by whoever asks, also after a start of everything."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import takewhile
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from engine.frame_tiers.archive import frames_on_disk
from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.messages import Promote
from engine.host_process.kept_memory import VARIABLE, KeptMemories, encode_kept
from tests.real.conftest import CONFIG, ONE, TWO, VLLM_ARGS, running
from tests.real.families.engines import Family, tokens
from tests.real.fleet import REPLICAS, RESTART_SECONDS_MAX, Answer, Fleet, answer_of, until
from tests.real.prompts import Words
from tests.real.small_caches import BLOCK, LENGTH, SMALL, WHOLE, chain_of, push_out, restoring, settle, stores
from tests.unit.engine.frame_tiers.node import Node
from tests.unit.engine.frame_tiers.vault_servers import Server, valkey
from transport.frames.codec import Quality
from transport.frames.frame import read_header
from transport.table.group_look_up import held_tokens

HOST_MEMORY = "128MiB"  # 42 blocks each: what `push_out` has a replica store fits, so nothing gives way before it is written
KEY = ONE.api_key.get_secret_value()
EQUAL_TOKENS_MIN = 8
"""Greedy tokens that an answer on KV restored from int8 has in common with one on KV as it was, before a near tie."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiers")


@pytest.fixture(scope="module")
def vault(home) -> Iterator[Server]:
    with valkey(home, bytes_max=512 << 20) as server:
        (home / "password").write_text(server.address.password)
        yield server


def fleet_of(home: Path, vault: Server) -> Fleet:
    """A fleet with small memories; the disk is `home`'s, and outlives it."""
    flags = ("--host-memory", HOST_MEMORY, "--disk", str(home / "disk"), "--disk-bytes", "1GiB")
    flags += ("--vault", f"valkey://127.0.0.1:{vault.address.port}", "--vault-password-file", str(home / "password"))
    flags += ("--lossy", "int8", "--tier-wait-seconds-max", "20")  # of a busy machine
    return Fleet(CONFIG, flags=flags, vllm_args=(*VLLM_ARGS, *SMALL), key=KEY)


@pytest.fixture(scope="module")
def tiered(home, vault) -> Iterator[Fleet]:
    with running(fleet_of(home, vault)) as fleet:
        until(lambda: [store["state"] for store in stores(fleet).values()] == ["ok", "ok"], 30, "disk and vault are in use")
        yield fleet


@pytest.fixture(scope="module")
def words(tiered) -> Words:
    return Words(tiered.model_dir)


def lose(fleet: Fleet, words: Words, replica: str) -> None:
    """Make a replica evict all that it holds, which goes down, and its memories forget it."""
    push_out(fleet, words, replica)
    settle(fleet)
    fleet.forget(replica)


def ask(fleet: Fleet, prompt: list[int], replica: str, key: str = "") -> tuple[Answer, str, dict]:
    """An answer, its x-peerkv-cache, and the explanation of its first attempt."""
    headers = fleet.headers(key) | {"x-peerkv-replica": replica}
    response = fleet.client.post("/v1/completions", json=fleet.body(prompt), headers=headers)
    explained = fleet.client.get(f"/kv/explain/{response.headers['x-request-id']}").raise_for_status().json()
    return answer_of(response), response.headers["x-peerkv-cache"], explained["attempts"][0]


@pytest.fixture(scope="module")
def prompt(tiered, words) -> tuple[list[int], Answer, Answer]:
    """A prompt, its answer computed and its answer from replica-0's own cache; lost there since."""
    ids = words.ids(LENGTH)
    cold, local = (tiered.answer(ids, replica="replica-0") for _ in range(2))
    assert (cold.cached_tokens, local.cached_tokens) == (0, WHOLE)
    lose(tiered, words, "replica-0")
    return ids, cold, local


def test_what_left_every_memory_is_restored_from_the_disk_there_and_elsewhere(tiered, words, prompt):
    ids, cold, local = prompt
    assert tiered.stats()["tiers"]["lost_blocks"] == 0
    with restoring(tiered, "replica-1", "disk"):
        answer, header, explained = ask(tiered, ids, "replica-1")
    assert answer.same_as(local)
    assert answer.close_to(cold)
    assert f'peer={WHOLE}, computed={LENGTH - WHOLE}, source="disk"' in header
    assert (explained["source"], explained["delivered"][0]["source"]) == ("disk", "disk")
    assert (explained["promoted"]["source"], explained["promoted"]["tokens"]) == ("disk", WHOLE)
    tiered.forget("replica-1")  # or it would be the source
    with restoring(tiered, "replica-0", "disk"):
        assert tiered.answer(ids, replica="replica-0").same_as(local)
    text = tiered.client.get("/metrics").raise_for_status().text
    assert f'peerkv_prompt_tokens_total{{replica="replica-1",source="disk"}} {float(WHOLE)}' in text
    assert 'peerkv_tier_ok{tier="disk"} 1.0' in text


def test_a_prefix_that_is_to_be_kept_comes_up_from_the_disk_and_nothing_of_it_is_computed(tiered, words):
    ids = words.ids(LENGTH)
    tiered.answer(ids, replica="replica-0")
    local = tiered.answer(ids, replica="replica-0")
    lose(tiered, words, "replica-0")
    before = {name: tiered.replica_stats(name)["tokens"] for name in REPLICAS}
    wanted = {"ids": ids, "tenant": ONE.name, "replicas": 1, "pin": False}
    (place,) = tiered.client.post("/kv/prefixes", json=wanted).raise_for_status().json()["places"]
    after = tiered.replica_stats(place["replica"])["tokens"]
    moved = {name: after[name] - before[place["replica"]][name] for name in after}
    assert (moved["disk"], moved["computed"]) == (WHOLE, LENGTH - WHOLE), moved  # what is behind the last full block
    with restoring(tiered, place["replica"], "local"):
        assert tiered.answer(ids, replica=place["replica"]).same_as(local)


def test_another_tenant_gets_nothing_of_it(tiered, prompt):
    ids, cold, _ = prompt
    foreign = tiered.answer(ids, replica="replica-1", key=TWO.api_key.get_secret_value())
    assert foreign.cached_tokens == 0
    assert foreign.close_to(cold)


def test_a_caller_who_accepts_loss_gets_back_what_was_kept_in_half_the_space(tiered, words, home, record_property):
    ids = words.choices(LENGTH, "with loss")
    key = TWO.api_key.get_secret_value()

    def asked(quality: str, replica: str) -> tuple[Answer, str | None]:
        headers = tiered.headers(key) | {"x-peerkv-replica": replica, "x-peerkv-quality": quality}
        response = tiered.client.post("/v1/completions", json=tiered.body(ids), headers=headers)
        return answer_of(response), response.headers.get("x-peerkv-quality")

    cold, told = asked("lossy", "replica-0")
    assert (cold.cached_tokens, told) == (0, "lossy")
    lose(tiered, words, "replica-0")
    exact, told = asked("exact", "replica-1")
    assert (exact.cached_tokens, told) == (0, None)
    assert exact.close_to(cold)
    with restoring(tiered, "replica-1", "disk"):
        restored, told = asked("lossy", "replica-1")
    assert (restored.cached_tokens, told) == (WHOLE, "lossy")
    losses = lost_of(restored, cold)
    assert 0 < max(losses) < 0.1
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(restored.tokens, cold.tokens, strict=True)))
    record_property("equal greedy tokens after an int8 restore", f"{equal} of {len(cold.tokens)}")
    assert equal >= EQUAL_TOKENS_MIN, (equal, losses)
    sizes: dict[Quality, list[int]] = {Quality.EXACT: [], Quality.LOSSY: []}
    for frame in frames_on_disk(home / "disk", lambda _: True):
        sizes[read_header(frame).quality].append(len(frame))
    assert len(sizes[Quality.LOSSY]) >= WHOLE // BLOCK
    assert median(sizes[Quality.LOSSY]) < 0.5 * median(sizes[Quality.EXACT])


def lost_of(restored: Answer, exact: Answer) -> list[float]:
    """How much the logprobs of a greedy answer differ, up to its first other token: after a near tie the text is another."""
    pairs = list(zip(restored.logprobs, exact.logprobs, restored.tokens, exact.tokens, strict=True))
    same = list(takewhile(lambda pair: pair[2] == pair[3], pairs))
    return [abs(ours - theirs) for ours, theirs, *_ in pairs[: len(same) + 1]]


def test_without_the_disks_files_it_is_restored_from_the_vault(tiered, prompt, home):
    ids, _, local = prompt
    for path in (home / "disk").glob("*.frames"):
        path.unlink()
    before = stores(tiered)["disk"]["stored_frames"]
    with closing(tiered.table("disk")) as table:
        os.kill(table.pid, signal.SIGKILL)  # or what came up from the disk would still be there
    until(lambda: counts_anew(tiered, before), 60, "another process has taken over from the one killed")
    tiered.forget("replica-0", "replica-1")
    with restoring(tiered, "replica-1", "vault"):
        answer, header, explained = ask(tiered, ids, "replica-1")
    assert answer.same_as(local)
    assert 'source="vault"' in header
    assert explained["promoted"]["source"] == "vault"


def test_a_vault_that_hangs_while_it_is_asked_is_counted_and_the_answer_is_right_all_the_same(tiered, words, vault):
    ids = words.ids(LENGTH)
    before = stores(tiered)["vault"]["errors"]
    os.kill(vault.process.pid, signal.SIGSTOP)
    try:
        answer, _, explained = ask(tiered, ids, "replica-0")  # the test's client has a deadline too
        assert answer.cached_tokens == 0
        assert not explained["promoted"]["source"]
        until(lambda: stores(tiered)["vault"]["errors"] > before, 30, "the vault's silence is counted")
    finally:
        os.kill(vault.process.pid, signal.SIGCONT)
    until(lambda: stores(tiered)["vault"]["state"] == "ok", 90, "the vault is in use again")
    tiered.forget("replica-0")
    assert tiered.answer(ids, replica="replica-0").close_to(answer)


def counts_anew(fleet: Fleet, before: int) -> bool:
    """Whether a new process serves: it counts from its self-test's frame and what the replicas' memories hold now."""
    found = stores(fleet)
    return {store["state"] for store in found.values()} == {"ok"} and 0 < found["disk"]["stored_frames"] < before


def test_a_killed_engine_restores_when_it_is_back(tiered, words):
    ids = words.ids(LENGTH)
    tiered.answer(ids, replica="replica-0")
    local = tiered.answer(ids, replica="replica-0")
    lose(tiered, words, "replica-0")
    tiered.kill("replica-0")
    tiered.wait_ready(RESTART_SECONDS_MAX)
    with restoring(tiered, "replica-0", "disk"):
        assert tiered.answer(ids, replica="replica-0").close_to(local, 1e-4)  # canaries may be in the same step


def test_after_everything_was_started_anew_the_disk_gives_it_back_and_a_flush_empties_all(tiered, words, home, vault):
    ids = words.ids(LENGTH)
    tiered.answer(ids, replica="replica-0")
    local = tiered.answer(ids, replica="replica-0")
    lose(tiered, words, "replica-0")
    assert tiered.stop() == 0
    vault.kill()
    with running(fleet_of(home, vault)) as fleet:
        until(lambda: stores(fleet)["disk"]["frames"] > 0, 30, "the disk is in use")
        assert "off: failed its self-test" in stores(fleet)["vault"]["state"]
        with restoring(fleet, "replica-1", "disk"):
            assert fleet.answer(ids, replica="replica-1").close_to(local, 1e-4)
        flushed = fleet.client.post("/kv/flush").json()
        assert "disk" in flushed["flushed"]
        assert "vault" in flushed["failed"]
        assert not list((home / "disk").glob("*.frames"))
        with restoring(fleet, "replica-1", "disk", whole=0):
            fleet.answer(ids, replica="replica-1")


def test_states_go_down_and_come_up(tmp_path):
    family = Family(tmp_path, "qwen3next", dtype="bfloat16", max_model_len=2048, num_gpu_blocks_override=20)
    family.tables.mkdir(mode=0o700)
    keeper = KeptMemories(family.tables)
    kept = keeper.keep("a", 64 << 20)
    node = Node(family.tables, DiskStore(tmp_path / "disk", 1 << 30), staging_bytes=64 << 20)
    try:
        family.start("a", environment={VARIABLE: encode_kept(kept)})
        block = family.block()
        ids, whole = tokens(2 * block + 3, 1), 2 * block
        cold, local = family.ask("a", ids), family.ask("a", ids)
        assert (cold.cached, local.cached) == (0, whole)
        with closing(family.table("a")) as table:
            chain, fingerprint = chain_of(table, ids), table.fingerprint
            for seed in range(2, 4 + table.num_blocks // 5):
                family.ask("a", tokens(whole + 3, seed))
                node.down()
            assert held_tokens(table, chain) == 0
            keys = np.ascontiguousarray(chain._chain)
        family.kill("a")
        for descriptor in keeper.descriptors():  # the host process and its memory end too
            os.close(descriptor)
        found = node.promote(Promote(1, fingerprint, keys.tobytes(), 0, 60.0))
        assert (found.source, found.tokens) == ("disk", whole)
        family.start("b")
        with family.counting("b") as counted:
            restored = family.ask("b", ids)
        assert (counted["tier_tokens_disk"], counted["check_failures"]) == (whole, 0)
        assert restored.same_as(local)
    finally:
        family.close()
        node.close()
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
