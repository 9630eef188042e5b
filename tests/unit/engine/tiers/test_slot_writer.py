"""Blocks into host memory and back: byte for byte, before they are overwritten, and never a changed byte."""

import mmap
import os
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.tiers import slot_writer
from engine.tiers.slot_writer import SlotWriter
from engine.tiers.slots import cut
from engine.tiers.stores import Store, Stores
from tests.real.fleet import until
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import description
from transport.backends.base import ImportJob
from transport.backends.shared_memory import SharedMemoryTransport, open_region
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.reader import TableReader

BLOCKS = 8
KEYS = chain_keys(root_key(b"f" * 16), range(4 * 16), 4)
REGION = 1 << 16
GROUPS = {"a.0": 0, "a.1": 0, "w.0": 1}


def caches(seed=None):
    """Two layers of a group and one, of smaller blocks, of another."""
    made = {name: torch.zeros(BLOCKS, 2, 4, 8 if name != "w.0" else 4) for name in GROUPS}
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in made.values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return made


class Tier:
    """An engine's tensors, its slots and their table."""

    def __init__(self, path: Path):
        self.tensors = caches(1)
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.own = SharedMemoryTransport(self.tensors, BLOCKS, 0, GROUPS)
        self.keeper = Keeper(path)
        kept = self.keeper.keep("r", REGION)
        self.slots = cut(kept.region, self.own.memory(), 1)
        self.writer = SlotWriter(self.own, self.slots)
        about = description("r.host-memory", memories=(self.slots.memory,))
        self.table = KeptTable(path, about, 4, self.slots.count, Path(kept.draft))
        self.copied: list[int] = []

    def store(self, *stores, overwritten=()):
        self.writer.begin(Stores(stores, frozenset(overwritten)))

    def wait(self, count):
        def done():
            self.copied += self.writer.take_copied()
            return len(self.copied) == count

        until(done, 20, "the blocks are copied", 0.001)


@pytest.fixture
def tier(tmp_path):
    made = Tier(tmp_path)
    yield made
    made.writer.close()


def restore(tier, slots, targets, counts):
    """Import slots of the tier into fresh tensors; return these and the result."""
    tensors = caches()
    taker = SharedMemoryTransport(tensors, BLOCKS, 0, GROUPS)
    with closing(TableReader(tier.table.path)) as reader:
        ids = np.array(slots, np.int32)
        states = np.array([reader._states[slot] for slot in slots], np.uint64)
        taker.start(
            ImportJob("q", reader.name, reader.epoch, ids, states, np.array(targets, np.int32), counts), reader, gently=True
        )
        results = []
        until(lambda: bool(results.extend(taker.poll()) or results), 20, "the import ends", 0.001)
    return tensors, results[0]


def key(place):
    return KEYS[place].tobytes()


def test_blocks_of_every_group_come_back_byte_for_byte(tier):
    tier.store(Store(1, 5, 0, key(0)), Store(2, 3, 0, key(1)), Store(6, 4, 1, key(2)))
    tier.wait(3)
    tier.table.publish([5, 3, 4], KEYS[:3])
    tensors, result = restore(tier, [5, 3, 4], [7, 1, 2], (2, 1))
    assert (result.failed_blocks, result.stale_blocks, result.reason) == ((), 0, "")
    for name in ("a.0", "a.1"):
        assert torch.equal(tensors[name][[7, 1]], tier.before[name][[1, 2]])
    assert torch.equal(tensors["w.0"][2], tier.before["w.0"][6])


def test_what_a_step_overwrites_is_copied_before_begin_returns(tier, monkeypatch):
    go = threading.Event()
    copy = SlotWriter._copy
    first = threading.Event()

    def slowly(self, store):
        if threading.current_thread() is not threading.main_thread():
            first.set()
            assert go.wait(20)
        copy(self, store)

    monkeypatch.setattr(slot_writer.SlotWriter, "_copy", slowly)
    tier.store(*(Store(block, block, 0, key(block)) for block in range(BLOCKS)))
    assert first.wait(20)  # the thread is at block 0
    threading.Timer(0.05, go.set).start()
    tier.store(overwritten=[0, 3, 5])
    for block in (0, 3, 5):
        assert block in tier.writer._copied
        tier.tensors["a.0"][block] = -1.0
    tier.wait(BLOCKS)
    tier.table.publish([0, 3, 5], KEYS[[0, 3, 5]])
    tensors, result = restore(tier, [0, 3, 5], [0, 3, 5], (3, 0))
    assert result.failed_blocks == ()
    assert torch.equal(tensors["a.0"][[0, 3, 5]], tier.before["a.0"][[0, 3, 5]])


def every_byte(tier, slot):
    memory = tier.slots.memory
    for layer in memory.layers:
        if layer.group == 0:
            yield from range(layer.offset + slot * layer.stride, layer.offset + slot * layer.stride + layer.bytes)
    begin = memory.checksums.offset + slot * memory.checksums.stride
    yield from range(begin, begin + 16)


def test_any_changed_byte_is_a_miss_of_that_block_alone(tier):
    tier.store(Store(1, 5, 0, key(0)), Store(2, 6, 0, key(1)))
    tier.wait(2)
    tier.table.publish([5, 6], KEYS[:2])
    fd = open_region(tier.slots.memory.regions[0], writable=True)
    with mmap.mmap(fd, REGION) as mapped:
        for place in [*every_byte(tier, 5)][::5]:
            mapped[place] ^= 1
            _, result = restore(tier, [5, 6], [0, 1], (2, 0))
            mapped[place] ^= 1
            assert (result.failed_blocks, result.stale_blocks) == ((0,), 1), place
            assert "checksum" in result.reason
        _, result = restore(tier, [5, 6], [0, 1], (2, 0))
        assert result.failed_blocks == ()
    os.close(fd)


def test_a_block_under_another_blocks_key_is_a_miss(tier):
    tier.store(Store(1, 5, 0, key(0)))
    tier.wait(1)
    tier.table.publish([5], KEYS[1:2])
    assert restore(tier, [5], [0], (1, 0))[1].failed_blocks == (0,)


def test_a_slot_that_was_given_to_another_block_is_a_miss(tier):
    tier.store(Store(1, 5, 0, key(0)))
    tier.wait(1)
    tier.table.publish([5], KEYS[:1])
    with closing(TableReader(tier.table.path)) as reader:
        run = reader.longest_run(KEYS[:1])
        tier.table.invalidate([5])
        taker = SharedMemoryTransport(caches(), BLOCKS, 0, GROUPS)
        job = ImportJob("q", reader.name, reader.epoch, run.block_ids, run.states, np.array([0], np.int32), (1, 0))
        taker.start(job, reader, gently=True)
        assert taker.poll()[0].failed_blocks == (0,)


def test_nothing_is_copied_once_it_is_closed(tier):
    tier.writer.close()
    tier.store(Store(1, 5, 0, key(0)), overwritten=[1])
    assert tier.writer.take_copied() == []
