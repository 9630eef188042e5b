"""Imports on GPUs, between two or between two engines on one: skipped without. `pytest tests/gpu`, a few minutes."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from tests.gpu.engine_pair import GRAPHS, Bench, gpu_scale
from tests.gpu.families import SHAPES, Run, one_family
from tests.gpu.import_times import exact
from tests.gpu.races import race
from tests.gpu.races_and_kills import kills
from tests.gpu.replica import write_model

GPUS = torch.cuda.device_count()
LAYERS = 8
"""Of the 8B shape: what is imported is the same a layer, and engines start sooner."""
pytestmark = pytest.mark.skipif(not GPUS, reason="needs a GPU")


@pytest.fixture
def bench(tmp_path):
    model = write_model(tmp_path / "llama", num_hidden_layers=LAYERS)
    scale = gpu_scale(model, exact=(1024, 8192), kills=4, pull=49152)
    scale.arguments |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 4 << 30}  # other tests may run beside it
    return Bench(scale, Path(tmp_path / "tables"))


@pytest.mark.parametrize("several", [False, True], ids=["one-group", "three-groups"])
def test_no_wrong_block_is_accepted_from_an_owner_that_rewrites_its_blocks(tmp_path, several):
    outcome = race(("cuda:0", f"cuda:{GPUS - 1}"), tmp_path, imports=500, seconds=60, several=several)
    assert outcome.accepted_blocks > 0
    assert outcome.check_failures > 0
    assert outcome.wrong_unchecked > 0
    assert outcome.wrong_blocks == 0


@pytest.mark.parametrize("variant", [{}, GRAPHS, {"kv_cache_dtype": "fp8"}])
def test_an_import_equals_a_local_prefix_hit_bit_by_bit(bench, variant):
    exact(bench, label="test", **variant)
    for row in bench.rows["exact"]:
        assert row["imported"] == (row["tokens"] - 1) // 16 * 16
        assert row["equal_to_local_hit"]
        assert row["equal_to_owner"]


@pytest.mark.parametrize("family", SHAPES)
def test_an_import_of_every_family_equals_a_local_prefix_hit_and_what_must_not_be_shared_is_not(tmp_path, family):
    given = argparse.Namespace(dry=False, tiny=True, cache_dtype="auto", graphs=False, devices=["0", str(GPUS - 1)])
    run = Run(given, tmp_path)
    one_family(run, family, ["exact", "told-apart"])
    assert run.failed == 0, json.dumps(run.rows, indent=1)


def test_an_owner_killed_in_the_middle_of_a_copy_is_not_believed_and_its_memory_is_freed(bench):
    kills(bench)
    (row,) = bench.rows["kills"]
    assert row["right_answers"] == row["killed"] == 4
    assert row["importer_lives"]
    if GPUS > 1:  # within one GPU copies are too short to hit, and the importer's memory is on it as well
        assert row["in_the_middle"] > 0
        assert row["owners_gpu_mib_after"] < row["owners_gpu_mib"] / 2
