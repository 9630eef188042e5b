"""Disk and vault on a GPU: skipped without one. `pytest tests/gpu -k frame_tiers`, a minute or two."""

from pathlib import Path

import pytest
import torch

from tests.gpu.engine_pair import Bench, gpu_scale
from tests.gpu.frame_tiers import (
    SALTS,
    STORES,
    Asked,
    ask,
    compute,
    engine_with_host_memory,
    lose,
    open_staging,
    tier_processes,
    written,
)
from tests.gpu.host_memory import OWN, REST_SECONDS, TIER, held
from tests.gpu.replica import prompt, write_model

pytestmark = pytest.mark.skipif(not torch.cuda.device_count(), reason="needs a GPU")
BLOCK = 16
LENGTHS = (31, 1024, 4097, 8192)
LAYERS = 8
"""Of the 8B shape: what is stored and restored is the same a layer, and engines start sooner."""


@pytest.fixture
def bench(tmp_path):
    model = write_model(tmp_path / "llama", num_hidden_layers=LAYERS)
    made = Bench(gpu_scale(model), Path(tmp_path / "tables"))
    made.scale.arguments |= {"kv_cache_memory_bytes": 6 << 30, "gpu_memory_utilization": 0.15}
    made.scale.restores, made.scale.host_memory = (2048, 8192), 6 << 30
    return made


@pytest.mark.parametrize("codec", ["raw-z", "raw"])
def test_what_left_all_memories_comes_up_from_disk_and_vault_to_the_last_bit(bench, codec):
    short = Asked(prompt(512, 1), "raw")
    prompts = [Asked(prompt(tokens, tokens + len(kind)), kind) for tokens in LENGTHS for kind in SALTS]
    with engine_with_host_memory(bench) as engine:
        for asked in (short, *prompts):
            compute(engine, asked)
            lose(bench, engine, asked)
            assert held(bench, TIER, asked.ids, asked.salt) == len(asked.ids) // BLOCK
            if asked.kind == "int8":
                asked.right = ask(engine, asked, TIER)
        engine.rest(REST_SECONDS)
        with tier_processes(bench, codec) as processes:
            assert [tiers.store for tiers in processes] == list(STORES)
            assert written(processes)[1]
            for stats in (tiers.stats() for tiers in processes):
                assert (stats.lost_blocks, stats.unknown_blocks, stats.stores[0].errors) == (0, 0, 0)
            engine.forget()
            for tiers in processes:
                open_staging(bench, engine, tiers, short)
                for asked in prompts:
                    whole = (len(asked.ids) - 1) // BLOCK * BLOCK
                    assert not held(bench, OWN, asked.ids, asked.salt)
                    promoted = tiers.bring(bench, asked.ids, asked.salt)
                    assert (promoted.source, promoted.tokens) == (tiers.store, len(asked.ids) // BLOCK * BLOCK)
                    before = bench.counters()
                    answer = ask(engine, asked, tiers.store)
                    after = bench.counters()
                    assert after[f"tier_tokens_{tiers.store}"] - before[f"tier_tokens_{tiers.store}"] == whole
                    assert after["fallbacks"] == before["fallbacks"]
                    assert answer.same_as(asked.right), (tiers.store, asked.kind, len(asked.ids))
                engine.forget()
