"""GPU blocks into host memory and back, on a simulated GPU that runs its streams in any order that their events allow."""

import importlib
import random
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.tiers.slots import cut
from engine.tiers.stores import Store, Stores
from tests.real.fleet import until
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.backends.simulated_gpu import WRITER, simulated
from tests.unit.transport.table_fixtures import description
from transport.backends.base import ImportJob, place_of
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.reader import TableReader

BLOCKS, SLOTS = 12, 20
KEYS = chain_keys(root_key(b"f" * 16), range(4 * 64), 4)
GROUPS = {"a.0": 0, "a.1": 0, "w.0": 1, "s.0": 2, "s.1": 2}
WORDS = {"a.0": 6, "a.1": 6, "w.0": 9, "s.0": 3, "s.1": 14}


def caches(seed=None):
    """The layers of three groups, with blocks of four sizes."""
    generator = torch.Generator().manual_seed(seed or 0)
    return {
        name: torch.randint(-(2**62), 2**62, (BLOCKS, words), generator=generator)
        if seed
        else torch.zeros(BLOCKS, words).long()
        for name, words in WORDS.items()
    }


class Tier:
    """An engine's tensors on the simulated GPU, and its slots with their table."""

    def __init__(self, path: Path, gpu, cuda_ipc) -> None:
        self.gpu, self.cuda_ipc = gpu, cuda_ipc
        self.tensors = caches(1)
        self.own = cuda_ipc.CudaIpcTransport(self.tensors, BLOCKS, 0, GROUPS)
        self.keeper = Keeper(path)
        stride = -(-max(8 * (6 + 6), 8 * 9, 8 * (3 + 14)) // 64) * 64
        self.kept = self.keeper.keep("r", SLOTS * stride)
        self.slots = cut(self.kept.region, self.own.memory(), 1)
        assert self.slots.count == SLOTS
        self.writer = importlib.import_module(WRITER).CudaSlotWriter(self.own, self.slots)
        about = description("r.host-memory", transport="cuda_ipc", memories=(self.slots.memory,))
        self.table = KeptTable(path, about, 4, self.slots.count, Path(self.kept.draft))
        self.written = {
            block: {name: tensor[block].clone() for name, tensor in self.tensors.items()} for block in range(BLOCKS)
        }

    def opened(self) -> "Tier":
        until(self.writer._slots.done, 20, "the slots are open", 0.001)
        return self

    def read(self, block: int, group: int) -> list[torch.Tensor]:
        """What a block will hold once the engine's stream has done all that was enqueued."""
        return [self.written[block][name] for name, each in GROUPS.items() if each == group]

    def overwrite(self, block: int) -> None:
        """The engine's stream writes a block, when it comes to it."""
        content = {name: torch.randint(-(2**62), 2**62, tensor[block].shape) for name, tensor in self.tensors.items()}

        def write() -> None:
            for name, tensor in self.tensors.items():
                tensor[block] = content[name]

        self.written[block] = content
        self.gpu.compute.enqueue(write)

    def restore(self, slots, counts, meanwhile=lambda: None):
        """Import slots into fresh tensors of another engine, block 0 onwards; return these and the result."""
        tensors = caches()
        taker = self.cuda_ipc.CudaIpcTransport(tensors, BLOCKS, 0, GROUPS)
        with closing(TableReader(self.table.path)) as reader:
            taker.prepare(reader)
            until(taker._peer(reader).done, 20, "the memory is open", 0.001)
            ids = np.array(slots, np.int32)
            states = np.array([reader._states[slot] for slot in slots], np.uint64)
            targets = np.arange(len(slots), dtype=np.int32)
            taker.start(ImportJob("q", reader.name, reader.epoch, ids, states, targets, counts), reader, gently=True)
            assert taker.poll() == []
            self.gpu.all()
            meanwhile()
            (result,) = taker.poll()
        taker.close()
        return tensors, result


@pytest.fixture(params=range(3))
def tier(request, tmp_path, monkeypatch):
    with simulated(monkeypatch, request.param) as (gpu, cuda_ipc):
        made = Tier(tmp_path, gpu, cuda_ipc)
        yield made
        made.writer.close()
        made.own.close()
        assert gpu.pinned == {}


def key(place):
    return KEYS[place].tobytes()


def test_whatever_is_told_to_be_filled_is_what_the_block_held_when_its_store_was_begun(tier, monkeypatch):
    """Steps of an engine at random: stores ahead, of what a step overwrites, and of what was overwritten before it was told."""
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCH_BLOCKS_MIN", 3)
    tier.opened()
    rng = random.Random(tier.gpu.rng.random())
    expected: dict[int, tuple[int, list[torch.Tensor]]] = {}
    free, under_way, filled, lost, stored = list(range(SLOTS)), {}, {}, [], 0
    for _ in range(60):
        tier.gpu.some()
        steady = [block for block in range(BLOCKS) if block not in under_way.values()]
        begun = []
        for block in rng.sample(steady, min(len(steady), len(free), rng.randrange(8))):
            slot, group = free.pop(rng.randrange(len(free))), rng.randrange(3)
            expected[slot] = (group, tier.read(block, group))
            under_way[slot] = block
            begun.append(Store(block, slot, group, key(0)))
        being = list(under_way.values())
        early, overwritten = (frozenset(block for block in being if rng.random() < chance) for chance in (0.1, 0.3))
        for block in early:
            tier.overwrite(block)
        tier.gpu.some()
        tier.writer.begin(Stores(tuple(begun), overwritten | early, early))
        for block in overwritten:
            tier.overwrite(block)
        tier.gpu.some()
        for slot in tier.writer.take_copied():
            filled[slot] = expected.pop(slot)
            del under_way[slot]
        for slot in tier.writer.take_lost():
            lost.append(slot)
            del under_way[slot]
            free.append(slot)
        for slot, (group, content) in filled.items():
            check(tier, slot, group, content)
        stored += len(filled)
        while len(filled) > 8:
            slot = next(iter(filled))
            del filled[slot]
            free.append(slot)
    tier.gpu.all()
    assert len(lost) > 5
    assert stored > 100


def overwriting_import(tier, monkeypatch):
    """Restore slots 0 to 7 into blocks 0 to 7, whose content is being stored in eight others; return what both will hold."""
    tier.opened()
    monkeypatch.setattr(tier.cuda_ipc, "PIECE_BLOCKS", 3)
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCH_BLOCKS_MAX", 2)
    tier.writer.begin(Stores(tuple(Store(8 + n % 4, n, 0, key(n)) for n in range(8)), frozenset(range(BLOCKS))))
    tier.gpu.all()
    assert len(tier.writer.take_copied()) == 8
    tier.table.publish(list(range(8)), KEYS[:8])
    reader = TableReader(tier.table.path)
    tier.own.prepare(reader)
    until(tier.own._peer(reader).done, 20, "the memory is open", 0.001)
    run = reader.longest_run(KEYS[:8])
    targets = np.arange(8, dtype=np.int32)
    job = ImportJob("q", reader.name, reader.epoch, run.block_ids, run.states, targets, (8, 0, 0))
    slots = {8 + n: tier.read(n, 0) for n in range(8)}
    restored = {n: tier.read(8 + n % 4, 0) for n in range(8)}
    tier.own.before_step()
    tier.writer.begin(Stores(tuple(Store(n, 8 + n, 0, key(8 + n)) for n in range(8)), imported=frozenset(range(8))))
    tier.own.start(job, reader, gently=True)
    return slots, restored


def test_an_import_waits_for_copies_of_what_it_overwrites_piece_by_piece(tier, monkeypatch):
    """Eight blocks in three pieces, stored by four launches: the first piece is here while the last is still to be stored."""
    slots, restored = overwriting_import(tier, monkeypatch)
    to_host, from_host = tier.own._to_host, tier.own._from_host
    run(tier.gpu.compute)
    run(from_host)
    assert arrived(tier, restored) == []  # all of them are still to be stored
    while arrived(tier, restored) != [0, 1]:
        to_host.run_one()
        run(from_host)
    assert to_host.queue
    tier.gpu.all()
    assert sorted(tier.writer.take_copied()) == sorted(slots)
    for slot, content in slots.items():
        check(tier, slot, 0, content)
    assert arrived(tier, restored) == list(range(8))
    (result,) = tier.own.poll()
    assert result.failed_blocks == ()
    assert tier.own._stored_by(result.job) is None  # nothing is being stored any more


def run(stream):
    """Let a stream run until it waits for another."""
    while stream.runnable():
        stream.run_one()


def arrived(tier, restored):
    """Which blocks hold what is restored into them, whole."""
    return [
        block
        for block, content in restored.items()
        if all(torch.equal(tier.tensors[name][block], each) for name, each in zip(("a.0", "a.1"), content, strict=True))
    ]


def test_neither_the_engine_nor_what_it_computes_beside_an_import_waits_for_those_copies(tier, monkeypatch):
    slots, _ = overwriting_import(tier, monkeypatch)
    done = []
    tier.gpu.compute.enqueue(lambda: done.append(1))
    run(tier.gpu.compute)
    assert done
    assert tier.writer.take_copied() == []
    tier.gpu.all()
    assert sorted(tier.writer.take_copied()) == sorted(slots)


def test_an_import_does_not_wait_for_the_step_that_it_begins_in(tier):
    tier.opened()
    tier.writer.begin(Stores((Store(1, 5, 0, key(0)),), frozenset({1})))
    tier.gpu.all()
    job, reader = job_of(tier, 5)
    tier.own.prepare(reader)
    until(tier.own._peer(reader).done, 20, "the memory is open", 0.001)
    tier.own.before_step()
    tier.overwrite(3)  # what the step computes
    tier.own.start(job, reader, gently=True)
    before = {name: tensor[1].clone() for name, tensor in tier.tensors.items()}
    stream = tier.own._from_host
    tier.gpu.compute.run_one()  # what was enqueued before the step, but not the step
    run(stream)
    assert not stream.queue
    assert tier.gpu.compute.queue
    assert torch.equal(tier.tensors["a.0"][7], before["a.0"])
    tier.gpu.all()


def check(tier, slot, group, content):
    mapping = next(iter(tier.own._host._mapped.values())).mapping
    layers = [layer for layer in tier.slots.memory.layers if layer.group == group]
    for layer, wanted in zip(layers, content, strict=True):
        begin = layer.offset + slot * layer.stride
        assert torch.equal(torch.frombuffer(bytearray(mapping[begin : begin + layer.bytes]), dtype=torch.int64), wanted)


def test_blocks_of_every_group_come_back_byte_for_byte_and_in_another_engine(tier):
    tier.opened()
    stores = (Store(1, 5, 0, key(0)), Store(2, 3, 0, key(1)), Store(6, 4, 1, key(2)), Store(7, 9, 2, key(3)))
    before = {name: tensor.clone() for name, tensor in tier.tensors.items()}
    tier.writer.begin(Stores(stores, frozenset({1, 2, 6, 7})))
    tier.gpu.all()
    assert sorted(tier.writer.take_copied()) == [3, 4, 5, 9]
    tier.table.publish([5, 3, 4, 9], KEYS[:4])
    tensors, result = tier.restore([5, 3, 4, 9], (2, 1, 1))
    assert (result.failed_blocks, result.stale_blocks, result.reason) == ((), 0, "")
    assert result.bytes == 8 * (2 * 12 + 9 + 17)
    for name, target, source in (
        ("a.0", 0, 1),
        ("a.1", 0, 1),
        ("a.0", 1, 2),
        ("a.1", 1, 2),
        ("w.0", 2, 6),
        ("s.0", 3, 7),
        ("s.1", 3, 7),
    ):
        assert torch.equal(tensors[name][target], before[name][source]), name


def test_a_slot_that_was_given_to_another_block_meanwhile_is_a_miss(tier):
    tier.opened()
    tier.writer.begin(Stores((Store(1, 5, 0, key(0)),), frozenset({1})))
    tier.gpu.all()
    tier.table.publish([5], KEYS[:1])
    _, result = tier.restore([5], (1, 0, 0), lambda: tier.table.invalidate([5]))
    assert (result.failed_blocks, result.stale_blocks, result.early) == ((0,), 1, False)


def job_of(tier, slot):
    """An import of a slot into block 7, and the table that it is of."""
    tier.table.publish([slot], KEYS[:1])
    reader = TableReader(tier.table.path)
    run = reader.longest_run(KEYS[:1])
    return ImportJob("q", reader.name, reader.epoch, run.block_ids, run.states, np.array([7], np.int32), (1, 0, 0)), reader


def test_until_the_slots_are_open_only_what_is_overwritten_is_lost(tmp_path, monkeypatch):
    with simulated(monkeypatch) as (gpu, cuda_ipc):
        go = threading.Event()
        register = cuda_ipc.HostRegions._register
        monkeypatch.setattr(cuda_ipc.HostRegions, "_register", lambda *given: go.wait(20) and register(*given))
        tier = Tier(tmp_path, gpu, cuda_ipc)
        stores = tuple(Store(block, block, 0, key(block)) for block in range(4))
        tier.writer.begin(Stores(stores, frozenset({2})))
        assert (tier.writer.take_copied(), tier.writer.take_lost()) == ([], [2])
        tier.own.start(*job_of(tier, 9), gently=True)
        (result,) = tier.own.poll()  # at once: pinning takes longer than computing a prompt
        assert (result.failed_blocks, result.early) == ((7,), True)
        go.set()
        tier.opened().writer.begin(Stores((), frozenset({0, 1, 3})))
        gpu.all()
        assert sorted(tier.writer.take_copied()) == [0, 1, 3]
        tier.writer.close()
        tier.own.close()
        assert gpu.pinned == {}


def test_memory_that_can_not_be_pinned_stores_nothing_says_so_once_and_fails_imports_alone(tmp_path, monkeypatch, caplog):
    with simulated(monkeypatch) as (gpu, cuda_ipc):
        monkeypatch.setattr("transport.backends.host_regions.SEGMENT_BYTES", 4096)
        gpu.refuses_after = 0
        tier = Tier(tmp_path, gpu, cuda_ipc).opened()
        for _ in range(2):
            tier.writer.begin(Stores((Store(1, 5, 0, key(0)), Store(2, 6, 0, key(1))), frozenset({2})))
            assert (tier.writer.take_copied(), sorted(tier.writer.take_lost())) == ([], [5, 6])
        (said,) = [record.getMessage() for record in caplog.records]
        assert (
            "CUDA cannot pin more than 0 MiB of host memory (cudaErrorMemoryAllocation): ask for less by --host-memory" in said
        )
        job = job_of(tier, 9)
        tier.own.start(*job, gently=True)
        until(lambda: tier.own._peers[place_of(job[1])][1].done(), 20, "it is known not to open", 0.001)
        (result,) = tier.own.poll()
        assert (result.failed_blocks, result.early) == ((7,), False)
        assert "cannot pin" in result.reason
        tier.writer.close()
        tier.own.close()
        assert gpu.pinned == {}


def test_memory_of_an_owner_that_lies_elsewhere_in_the_same_epoch_is_opened_and_the_former_let_go(tmp_path, monkeypatch):
    with simulated(monkeypatch) as (gpu, cuda_ipc):
        tier = Tier(tmp_path, gpu, cuda_ipc).opened()
        elsewhere = cut(tier.keeper.keep("other", tier.kept.region.size).region, tier.own.memory(), 1).memory
        reader = TableReader(tier.table.path)
        moved = SimpleNamespace(
            name=reader.name, epoch=reader.epoch, num_blocks=reader.num_blocks, memories=(elsewhere,),
            alive=reader.alive, unchanged=reader.unchanged,
        )  # fmt: skip
        taker = cuda_ipc.CudaIpcTransport(caches(), BLOCKS, 0, GROUPS)
        for each in (reader, moved):
            taker.prepare(each)
            until(taker._peer(each).done, 20, "the memory is open", 0.001)
        first, second = (taker._peer(each).result().layers for each in (reader, moved))
        assert not torch.equal(first, second)
        taker.retain({(reader.name, reader.epoch)})
        assert set(taker._peers) == {place_of(moved)}
        taker.close()
        tier.writer.close()
        tier.own.close()
        assert gpu.pinned == {}


def test_few_blocks_that_nothing_overwrites_wait_for_more_and_many_go_in_bounded_launches(tier, monkeypatch):
    tier.opened()
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCH_BLOCKS_MIN", 3)
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCH_BLOCKS_MAX", 2)
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCHES_MAX", 2)
    stores = [Store(block, block, block % 3, key(block)) for block in range(BLOCKS)]
    tier.writer.begin(Stores(tuple(stores[:2])))
    tier.gpu.all()
    assert tier.writer.take_copied() == []
    tier.writer.begin(Stores(tuple(stores[2:])))
    tier.gpu.all()
    assert sorted(tier.writer.take_copied()) == [0, 1, 2, 3]
    tier.writer.begin(Stores((), frozenset({11})))
    tier.gpu.all()
    assert sorted(tier.writer.take_copied()) == [4, 5, 6, 7, 11]


def test_all_copies_are_begun_in_a_step_that_may_be_the_last_one_for_long(tier, monkeypatch):
    tier.opened()
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCH_BLOCKS_MAX", 2)
    monkeypatch.setattr(importlib.import_module(WRITER), "LAUNCHES_MAX", 1)
    stores = [Store(block, block, block % 3, key(block)) for block in range(7)]
    tier.writer.begin(Stores(tuple(stores), at_once=True))
    tier.gpu.all()  # without another step
    assert sorted(tier.writer.take_copied()) == list(range(7))
    for store in stores:
        check(tier, store.slot, store.group, tier.read(store.block, store.group))
