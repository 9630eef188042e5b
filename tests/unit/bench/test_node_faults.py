"""A few hundred faults between two nodes, and that the comparison would find a wrong block, and one that was touched."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pytest

from bench.node_faults.__main__ import chaos, inject, total
from bench.node_faults.faults import WITH_TLS, WITHOUT_TLS, Injected
from bench.node_faults.rig import JUNK, LAYER_BYTES, LAYERS, Rig, rig
from transport.backends.base import ImportJob

FAULTS = 200
SURE = ("connections refused", "overwritten, since the look-up", "another epoch, under the copy", "blocks of another size")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_of_hundreds_of_faults_none_gives_a_wrong_block_and_none_hangs() -> None:
    tallies = chaos(FAULTS, seed=7)
    assert tallies.keys() == WITH_TLS.keys() | WITHOUT_TLS.keys()
    assert all(tally.faults for tally in tallies.values())
    assert all(tallies[name].computed_blocks for name in SURE)
    summed = total(tallies)
    assert (summed.faults, summed.wrong_blocks, summed.touched_blocks, summed.hung) == (FAULTS, 0, 0, 0)
    assert summed.hit > FAULTS / 2
    assert summed.good_blocks > FAULTS


@contextmanager
def nothing(made: Rig, job: ImportJob) -> Iterator[Injected]:
    yield Injected()


@contextmanager
def lying_owner(made: Rig, job: ImportJob) -> Iterator[Injected]:
    """Its memory has changed, and its table vouches for it."""
    made.owner.memory.put(int(job.source_blocks[0]), np.full((LAYERS, LAYER_BYTES), JUNK, np.uint8))
    yield Injected()


@contextmanager
def late_write(made: Rig, job: ImportJob) -> Iterator[Injected]:
    """Something else than the import writes into the importer's memory."""
    others = sorted(set(range(64)) - set(job.target_blocks.tolist()))
    yield Injected(meanwhile=lambda: made.memory.put(others[0], made.true[1]))


def test_the_comparison_finds_a_wrong_block_and_one_that_was_touched(tmp_path: Path) -> None:
    with rig(tmp_path, Random(3), keys=False) as made:
        for fault, found in ((nothing, (0, 0, 0)), (late_write, (0, 0, 1)), (lying_owner, (0, 1, 0))):
            imported, _ = inject(made, fault)
            assert (imported.failed, imported.wrong, imported.late) == found
