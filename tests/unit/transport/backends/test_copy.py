"""Shared memory, beyond what every way of reading has to do (`tests/unit/engine/connector/test_ways_of_reading.py`)."""

import os
import signal
from contextlib import closing

import numpy as np
import pytest
import torch

from tests.unit.transport.table_fixtures import writer
from transport.backends.base import ImportJob
from transport.backends.geometry import layer_geometries
from transport.backends.shared_memory import SharedMemoryTransport
from transport.errors import MemoryUnreachable
from transport.keys import chain_keys, root_key
from transport.node.fetches import StagedReader
from transport.table.directory import TableDirectory
from transport.table.reader import TableReader

BLOCKS, LAYERS = 16, 3
KEYS = chain_keys(root_key(b"f" * 16), range(BLOCKS * 4), 4)


def one_allocation(blocks=BLOCKS):
    """All layers in one allocation, one after the other."""
    whole = torch.zeros(LAYERS, blocks, 2, 4, 8, dtype=torch.bfloat16)
    return {f"layer.{i}": whole[i] for i in range(LAYERS)}


def own_allocations(blocks=BLOCKS):
    """Each layer in an allocation of its own."""
    return {f"layer.{i}": torch.zeros(blocks, 2, 4, 8, dtype=torch.float32) for i in range(LAYERS)}


def padded(blocks=BLOCKS):
    """Blocks with a gap behind each, every layer at an offset of its own in one allocation."""
    whole = torch.zeros(blocks, LAYERS, 2, 4, 8, dtype=torch.float16)
    return {f"layer.{i}": whole[:, i] for i in range(LAYERS)}


def split_kernel_blocks(blocks=BLOCKS):
    """Two kernel blocks for each of the engine's."""
    return {f"layer.{i}": torch.zeros(blocks * 2, 2, 2, 8, dtype=torch.uint8) for i in range(LAYERS)}


LAYOUTS = [one_allocation, own_allocations, padded, split_kernel_blocks]


def fill(caches, seed):
    generator = torch.Generator().manual_seed(seed)
    for tensor in caches.values():
        tensor.copy_(torch.randint(0, 100, tensor.shape, generator=generator).to(tensor.dtype))


class Owner:
    """A replica with memory and a table, whose block `block` is offered under `KEYS[place]`."""

    def __init__(self, path, layout):
        self.caches = layout()
        fill(self.caches, 1)
        transport = SharedMemoryTransport(self.caches, BLOCKS)
        self.table = writer(path, "owner", BLOCKS, memories=(transport.memory(),))
        self.reader = TableDirectory(path).tables()["owner"]

    def job(self, blocks, targets):
        self.table.publish(blocks, KEYS[: len(blocks)])
        run = self.reader.longest_run(KEYS[: len(blocks)])
        return ImportJob("r", "owner", self.reader.epoch, run.block_ids, run.states, np.array(targets, np.int32))


def drain(transport):
    results = []
    while transport.pending():
        results += transport.poll()
    return results


def rows(tensor, block):
    ratio = tensor.shape[0] // BLOCKS
    return tensor[block * ratio : (block + 1) * ratio]


def test_layers_that_are_in_no_group_are_not_shared():
    with pytest.raises(MemoryUnreachable, match=r"layer\.1 is in no KV cache group"):
        layer_geometries(one_allocation(), BLOCKS, {"layer.0": 0})


def test_moving_the_cache_into_shared_memory_keeps_its_content(tmp_path):
    caches = one_allocation()
    fill(caches, 3)
    before = {name: tensor.clone() for name, tensor in caches.items()}
    SharedMemoryTransport(caches, BLOCKS)
    assert all(torch.equal(caches[name], before[name]) for name in caches)
    assert all(tensor.untyped_storage().is_shared() for tensor in caches.values())


@pytest.mark.parametrize("again", [False, True])
def test_a_block_reallocated_before_the_check_is_reported_as_failed(tmp_path, again):
    owner, importer = Owner(tmp_path, own_allocations), SharedMemoryTransport(own_allocations(), BLOCKS)
    with closing(owner.table):
        job = owner.job([3, 9, 4], [0, 15, 7])
        importer.start(job, owner.reader, gently=False)
        owner.table.invalidate([9])
        if again:
            owner.table.publish([9], KEYS[1:2])
        (result,) = drain(importer)
    assert (result.failed_blocks, result.stale_blocks) == ((15,), 1)
    assert "reallocated" in result.reason


def test_an_owner_that_ends_before_the_check_fails_the_whole_import(tmp_path):
    owner, importer = Owner(tmp_path, own_allocations), SharedMemoryTransport(own_allocations(), BLOCKS)
    importer.start(owner.job([3, 9], [0, 15]), owner.reader, gently=False)
    owner.table.close()
    (result,) = drain(importer)
    assert set(result.failed_blocks) == {0, 15}
    assert "ended" in result.reason


def test_a_mirror_whose_blocks_come_to_other_memory_in_the_same_epoch_is_read_there(tmp_path):
    """The agent that fetches for a mirror was started again: its owner, and so the epoch, is the same."""
    target = own_allocations()
    importer = SharedMemoryTransport(target, BLOCKS)
    for seed in (1, 2):
        fetched = own_allocations()
        fill(fetched, seed)
        memory = SharedMemoryTransport(fetched, BLOCKS).memory()
        with closing(writer(tmp_path / str(seed), "node-b:owner", BLOCKS, memories=(memory,))) as mirror:
            reader = StagedReader(TableReader(mirror.path), memory, np.ones(2, np.bool_), BLOCKS)
            reader.epoch = 7
            ids = np.array([3, 4], np.int32)
            job = ImportJob("r", reader.name, reader.epoch, ids, np.zeros(2, np.uint64), np.array([8, 9], np.int32))
            importer.start(job, reader, gently=True)
            (result,) = drain(importer)
        assert result.failed_blocks == ()
        for name, tensor in fetched.items():
            assert torch.equal(target[name][8:10], tensor[3:5])
        importer.retain({(reader.name, reader.epoch)})
    assert len(importer._peers) == 1


def test_memory_whose_process_is_gone_is_unreachable_not_a_crash(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        held = Owner(tmp_path, own_allocations)
        held.table.publish([1], KEYS[:1])
        os.write(told, b"x")
        signal.pause()
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    reader = TableDirectory(tmp_path).tables()["owner"]
    run = reader.longest_run(KEYS[:1])
    importer = SharedMemoryTransport(own_allocations(), BLOCKS)
    job = ImportJob("r", "owner", reader.epoch, run.block_ids, run.states, np.array([0], np.int32))
    importer.start(job, reader, gently=False)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (result,) = drain(importer)
    assert result.failed_blocks == (0,)
    importer.retain(set())
    with pytest.raises(MemoryUnreachable, match="PID namespace"):
        importer.start(job, reader, gently=False)


def test_a_layer_said_to_end_beyond_its_memory_is_refused(tmp_path):
    caches = own_allocations()
    small = SharedMemoryTransport(own_allocations(BLOCKS), BLOCKS)
    table = writer(tmp_path, "owner", BLOCKS * 2, memories=(small.memory(),))
    reader = TableDirectory(tmp_path).tables()["owner"]
    importer = SharedMemoryTransport(caches, BLOCKS)
    table.publish([BLOCKS * 2 - 1], KEYS[:1])
    run = reader.longest_run(KEYS[:1])
    job = ImportJob("r", "owner", reader.epoch, run.block_ids, run.states, np.array([0], np.int32))
    with closing(table), pytest.raises(MemoryUnreachable, match="beyond its memory"):
        importer.start(job, reader, gently=False)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(BLOCKS + 1, 2, 4, 8), torch.zeros(BLOCKS, 4, 2, 16)[..., ::2], torch.zeros(2, BLOCKS, 4).transpose(0, 1)],
)
def test_a_layout_whose_blocks_are_not_dense_is_refused(tensor):
    with pytest.raises(MemoryUnreachable):
        layer_geometries({"layer": tensor}, BLOCKS)


def test_a_large_import_goes_on_over_several_polls(tmp_path, monkeypatch):
    monkeypatch.setattr("transport.backends.shared_memory.SLICE_SECONDS", 0.0)
    owner, caches = Owner(tmp_path, own_allocations), own_allocations()
    importer = SharedMemoryTransport(caches, BLOCKS)
    with closing(owner.table):
        importer.start(owner.job([1, 3, 5], [0, 2, 4]), owner.reader, gently=False)
        assert importer.poll() == []
        assert importer.pending() == 1
        (result,) = drain(importer)
    assert result.failed_blocks == ()
    assert torch.equal(caches["layer.2"][4], owner.caches["layer.2"][5])
