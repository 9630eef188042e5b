"""Imports between two GPUs: skipped without them. `pytest tests/gpu`, a few minutes."""

from pathlib import Path

import pytest
import torch

from tests.gpu.bench import GRAPHS, Bench, Scale, exact, kills
from tests.gpu.races import race
from tests.gpu.replica import write_model

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def bench(tmp_path):
    return Bench(Scale(write_model(tmp_path / "llama8b"), exact=(1024, 8192), kills=4, pull=16384), Path(tmp_path / "tables"))


def test_no_wrong_block_is_accepted_from_an_owner_that_rewrites_its_blocks(tmp_path):
    outcome = race(("cuda:0", "cuda:1"), tmp_path, imports=500, seconds=60)
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


def test_an_owner_killed_in_the_middle_of_a_copy_is_not_believed_and_its_memory_is_freed(bench):
    kills(bench)
    (row,) = bench.rows["kills"]
    assert row["in_the_middle"] > 0
    assert row["right_answers"] == row["killed"] == 4
    assert row["importer_lives"]
    assert row["owners_gpu_mib_after"] < row["owners_gpu_mib"] / 2
