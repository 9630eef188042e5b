"""Host memory on a GPU: skipped without one. `pytest tests/gpu -k host_memory`, a few minutes."""

import argparse
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from engine.host_process.kept_memory import VARIABLE, KeptMemories, encode_kept
from tests.gpu.engine_pair import GRAPHS, Bench, gpu_scale
from tests.gpu.families import Run, ask
from tests.gpu.host_memory import OWN, TIER, held, keeping, lose, with_host_memory
from tests.gpu.replica import Replica, prompt, write_model
from transport.groups import step
from transport.keys import chain_keys, root_key
from transport.table.group_look_up import GroupChain, held_tokens
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of

pytestmark = pytest.mark.skipif(not torch.cuda.device_count(), reason="needs a GPU")
BLOCK = 16
WHOLE = 8192 - BLOCK
LAYERS = 8
"""Of the 8B shape: what is stored and restored is the same a layer, and engines start sooner."""


@pytest.fixture
def bench(tmp_path):
    model = write_model(tmp_path / "llama", num_hidden_layers=LAYERS)
    small = {"kv_cache_memory_bytes": 6 << 30, "gpu_memory_utilization": 0.15}
    made = Bench(gpu_scale(model), Path(tmp_path / "tables"))
    made.scale.arguments |= small
    made.scale.restores, made.scale.host_memory = (2048, 8192), 6 << 30
    return made


@pytest.mark.parametrize("variant", [{}, GRAPHS, {"kv_cache_dtype": "fp8"}], ids=["eager", "graphs", "fp8"])
def test_what_left_the_cache_is_restored_to_the_last_bit_here_and_elsewhere(bench, variant):
    bench.scale.arguments |= variant
    with with_host_memory(bench) as (a, b, _):
        dropped = bench.counters(TIER)["tier_dropped_blocks"]  # those of before it was open
        for tokens in (31, 1024, 4097, 8192):
            ids, whole = prompt(tokens, tokens + 3), (tokens - 1) // BLOCK * BLOCK
            b.ask(ids, 16, logprobs=True, source="")
            hit = b.ask(ids, 16, logprobs=True, source="")
            lose(bench, b, ids, 100 * tokens, 8192)
            assert held(bench, TIER, ids) == tokens // BLOCK
            before = bench.counters()
            restored = b.ask(ids, 16, logprobs=True, source=TIER)
            after = bench.counters()
            assert after["tier_tokens_host_memory"] - before["tier_tokens_host_memory"] == whole
            assert after["fallbacks"] == before["fallbacks"]
            assert restored.same_as(hit), tokens
            elsewhere = a.ask(ids, 16, logprobs=True, source=TIER)
            assert elsewhere.cached == whole
            assert elsewhere.same_as(hit), tokens
        assert bench.counters(TIER)["tier_dropped_blocks"] == dropped


def test_a_killed_engines_host_memory_is_restored_by_another_and_by_its_successor(bench):
    with with_host_memory(bench) as (a, b, keeper):
        ids = prompt(8192, 5)
        b.ask(ids, 16, logprobs=True, source="")
        hit = b.ask(ids, 16, logprobs=True, source="")
        lose(bench, b, ids, 900)
        b.kill()
        elsewhere = a.ask(ids, 16, logprobs=True, source=TIER)
        assert elsewhere.cached == WHOLE
        assert elsewhere.same_as(hit)
        base = bench.scale.arguments | keeping(bench, keeper)
        successor = Replica(OWN, bench.scale.devices[1], bench.scale.model, bench.tables, **base).ready()
        try:
            assert held(bench, TIER, ids) == 8192 // BLOCK
            deadline = time.monotonic() + 30
            while (restored := successor.ask(ids, 16, logprobs=True, source=TIER)).cached != WHOLE:
                assert time.monotonic() < deadline, "its memory is not open yet"
                lose(bench, successor, ids, time.time_ns())
            assert restored.same_as(hit)
        finally:
            successor.stop()


@pytest.mark.parametrize("family", ["gemma3", "gptoss", "granite4"])
def test_of_several_groups_whatever_is_restored_is_what_was_there(tmp_path, family):
    """Windows come back whole. With states vLLM overwrites blocks before it tells of it: what is not stored ahead is lost."""
    run = Run(argparse.Namespace(dry=False, tiny=True, cache_dtype="auto", graphs=False, devices=["0", "0"]), tmp_path)
    run.tables.mkdir(mode=0o700, parents=True)
    kept = encode_kept(KeptMemories(run.tables).keep("a", 1 << 30))
    model, arguments = run.telling(family, 2048)
    arguments |= {"max_model_len": 2048, "num_gpu_blocks_override": 160 if family == "granite4" else 1200}
    engine = run.engine("a", model, **arguments, environment={VARIABLE: kept}).ready()
    try:
        with closing(run.table("a")) as table, closing(run.table(host_memory_of("a"))) as tier:
            size = step(table.groups)
            ids = run.prompt(min(max(3 * size, 1200) + 5, 2000), 1)
            ask(engine, ids, source="")
            hit = ask(engine, ids, source="")
            deadline, seed = time.monotonic() + 60, 2
            while held_tokens(table, chain_of(table, ids)) or not tier.counters()["published_blocks"]:
                assert time.monotonic() < deadline
                ask(engine, run.prompt(1500, seed), source="")
                seed += 1
            restored = ask(engine, ids, source=host_memory_of("a"))
            counted = table.counters()
            assert restored.cached < hit.cached or restored.same_as(hit)
            assert (counted["table_errors"], counted["fallbacks"]) == (0, 0)
            if family != "granite4":
                assert counted["tier_tokens_host_memory"] == hit.cached
    finally:
        engine.kill()


def chain_of(table: TableReader, ids: list[int]) -> GroupChain:
    return GroupChain(table.groups, chain_keys(root_key(table.fingerprint), ids, table.block_size, table.hash_name))
