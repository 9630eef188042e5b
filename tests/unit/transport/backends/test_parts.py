"""A long import is copied in parts: what is copied and passed the check is good while the rest is on its way."""

import numpy as np
import pytest
import torch

from tests.unit.transport.backends.simulated_gpu import simulated
from tests.unit.transport.table_fixtures import writer
from transport.backends.base import ImportJob
from transport.keys import chain_keys, root_key
from transport.table.reader import TableReader

BLOCKS, COUNT = 40, 16
KEYS = chain_keys(root_key(b"f" * 16), range(COUNT * 4), 4)
SOURCE, TARGET = list(range(20, 20 + COUNT)), list(range(3, 3 + COUNT))


def caches(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{n}": torch.randint(-(2**62), 2**62, (BLOCKS, 6), generator=generator) for n in range(2)}


class Copy:
    """An import of COUNT blocks under way on a simulated GPU, in parts of 8, 6 and 2 blocks."""

    def __init__(self, path, gpu, cuda_ipc) -> None:
        self.gpu, self.theirs, self.ours = gpu, caches(1), caches(2)
        self.owner = cuda_ipc.CudaIpcTransport(self.theirs, BLOCKS)
        self.importer = cuda_ipc.CudaIpcTransport(self.ours, BLOCKS)
        self.table = writer(path, "owner", BLOCKS, transport="cuda_ipc", memories=(self.owner.memory(),))
        self.table.publish(SOURCE, KEYS)
        self.reader = TableReader(self.table.path)
        run = self.reader.longest_run(KEYS)
        self.importer.prepare(self.reader)
        job = ImportJob("r", "owner", self.reader.epoch, run.block_ids, run.states, np.array(TARGET, np.int32))
        self.importer._peer(self.reader).result(20)
        self.importer.start(job, self.reader, gently=False)

    def parts(self, count: int) -> list:
        """Let the GPU do this many parts of the copy; return what a poll then finds."""
        for _ in range(count):
            queue = self.importer._stream.queue
            while queue[0][0] != "run":
                self.importer._stream.run_one()
            self.importer._stream.run_one()
            self.importer._stream.run_one()  # the record of its end
        return self.importer.poll()

    def close(self) -> None:
        self.gpu.all()
        for each in (self.importer, self.owner, self.reader, self.table):
            each.close()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    with simulated(monkeypatch) as (gpu, cuda_ipc):
        monkeypatch.setattr(cuda_ipc, "PART_BLOCKS_MIN", COUNT)
        made = Copy(tmp_path, gpu, cuda_ipc)
        yield made
        made.close()


def test_what_is_copied_is_good_before_the_rest_is(copy):
    assert (copy.parts(0), copy.importer.checked()) == ([], {})
    for part, good in ((1, 8), (1, 14)):
        assert (copy.parts(part), copy.importer.checked()) == ([], {("r", 0): good})
        for name, tensor in copy.ours.items():
            assert torch.equal(tensor[TARGET[:good]], copy.theirs[name][SOURCE[:good]])
            assert not torch.equal(tensor[TARGET[good]], copy.theirs[name][SOURCE[good]])
    (result,) = copy.parts(1)
    assert (result.failed_blocks, result.bytes, copy.importer.checked()) == ((), COUNT * 2 * 48, {})
    for name, tensor in copy.ours.items():
        assert torch.equal(tensor[TARGET], copy.theirs[name][SOURCE])


def test_a_block_that_changed_before_its_part_was_checked_fails_and_nothing_behind_it_is_called_good(copy):
    copy.table.invalidate([SOURCE[5]])
    assert (copy.parts(1), copy.importer.checked()) == ([], {})
    copy.table.publish([SOURCE[5]], KEYS[5:6])
    assert (copy.parts(1), copy.importer.checked()) == ([], {})
    (result,) = copy.parts(1)
    assert (result.failed_blocks, result.stale_blocks) == ((TARGET[5],), 1)


def test_a_block_that_changed_after_its_part_was_checked_is_good_and_one_of_a_later_part_is_not(copy):
    copy.parts(1)
    copy.table.invalidate([SOURCE[5], SOURCE[9]])
    assert (copy.parts(1), copy.importer.checked()) == ([], {("r", 0): 8})
    (result,) = copy.parts(1)
    assert (result.failed_blocks, result.stale_blocks) == ((TARGET[9],), 1)


def test_of_an_owner_that_ends_what_was_checked_before_is_good(copy):
    copy.parts(1)
    copy.table.close()
    assert (copy.parts(1), copy.importer.checked()) == ([], {("r", 0): 8})
    (result,) = copy.parts(1)
    assert result.failed_blocks == tuple(TARGET[8:])
    assert "ended" in result.reason


def test_the_end_of_a_copy_is_expected_by_the_time_that_its_first_part_took(copy, monkeypatch):
    """The simulated GPU says that it took a millisecond: the whole takes two."""
    assert not copy.importer.ends_within(1e9)
    copy.parts(1)
    began = copy.importer._copies[0].began
    for after, soon in ((0.0, False), (0.0016, False), (0.0019, True), (0.0022, True), (0.003, False)):
        with monkeypatch.context() as now:
            now.setattr("time.monotonic", lambda after=after: began + after)
            assert copy.importer.ends_within(0.0003) is soon
