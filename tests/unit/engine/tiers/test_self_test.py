"""What host memory does not give back as it was stored is not used, and what is on offer is not touched to find out."""

import ctypes
import importlib
import logging

import pytest
import torch

from engine.connector.worker import WorkerHalf
from engine.host_process.kept_memory import decode_kept, encode_kept
from engine.tiers import slot_writer
from engine.tiers.self_test import FAILED
from engine.tiers.slots import Slots
from engine.tiers.stores import Store, Stores
from tests.unit.engine.connector.test_two_engines_with_host_memory import Working
from tests.unit.engine.keeper import Keeper
from tests.unit.engine.tiers import test_cuda_slot_writer as gpus
from tests.unit.engine.tiers.test_slot_writer import BLOCKS, GROUPS, REGION, Tier, caches
from tests.unit.transport.backends.simulated_gpu import WRITER, simulated
from transport.backends.shared_memory import map_region
from transport.errors import MemoryUnreachable
from transport.table.tiers import host_memory_of

LAST = BLOCKS - 1


@pytest.fixture
def tier(tmp_path):
    made = Tier(tmp_path)
    yield made
    made.writer.close()


def registered(tmp_path):
    """A worker's half that was given host memory, and its KV tensors."""
    keeper, tensors = Keeper(tmp_path), caches(1)
    half = WorkerHalf(tmp_path, "r", 0, keeper.keep("r", REGION))
    half.register(tensors, BLOCKS, GROUPS)
    return half, tensors, keeper


def test_memory_that_keeps_what_it_is_given_is_used_and_the_engines_is_as_it_was(tmp_path):
    half, tensors, _keeper = registered(tmp_path)
    assert isinstance(half.handshake({}).host_memory, Slots)
    assert all(torch.equal(tensors[name], each) for name, each in caches(1).items())
    assert half.take_report().copied == {}
    half.close()


@pytest.mark.parametrize("group", sorted(set(GROUPS.values())))
def test_memory_that_changes_a_byte_of_any_group_is_not_used_and_says_so(tmp_path, monkeypatch, group):
    copy = slot_writer.SlotWriter._copy

    def changing(writer, store):
        copy(writer, store)
        if store.group == group:
            writer._bytes[writer._pieces[group][-1][2] + store.slot * writer._checksums.stride + 5] ^= 4

    monkeypatch.setattr(slot_writer.SlotWriter, "_copy", changing)
    half, tensors, _keeper = registered(tmp_path)
    assert half.handshake({}).host_memory == f"{FAILED}: a block of KV cache group {group} did not come back as it was stored"
    assert all(torch.equal(tensors[name], each) for name, each in caches(1).items())
    half.close()


def test_the_engine_goes_on_without_and_counts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(slot_writer.SlotWriter, "_copy", lambda writer, store: None)  # as if the memory took nothing
    (tmp_path / "tables").mkdir(mode=0o700)
    keeper = Keeper(tmp_path / "tables")
    engine = Working(tmp_path, "a", decode_kept(encode_kept(keeper.keep("a", 1 << 16))), monkeypatch)
    assert engine.table.counters()["table_errors"] == 1
    assert not (tmp_path / "tables" / f"{host_memory_of('a')}.table").exists()
    assert engine.table.status == "ok"  # it exchanges blocks all the same
    engine.worker.close()
    engine.scheduler.connector.shutdown()


def test_memory_whose_checksums_are_wrong_is_not_used(tier, monkeypatch):
    monkeypatch.setattr(slot_writer, "checksum", lambda data, key: bytes(16))
    with pytest.raises(MemoryUnreachable, match="does not match its checksum"):
        tier.writer.try_out(0, LAST)


def content(region):
    with map_region(region) as mapped:
        return mapped[:]


def test_what_an_earlier_engine_may_have_on_offer_stays_as_it_is_whatever_is_known_of_tables(tmp_path):
    keeper = Keeper(tmp_path)
    first = keeper.keep("r", REGION)
    with map_region(first.region, writable=True) as mapped:
        mapped[:] = b"k" * REGION
    again = decode_kept(encode_kept(keeper.keep("r", REGION)))
    assert (first.new, again.new) == (True, False)
    half = WorkerHalf(tmp_path, "r", 0, again)  # there is no table, or none is found for lack of descriptors
    half.register(caches(1), BLOCKS, GROUPS)
    assert isinstance(half.handshake({}).host_memory, Slots)
    assert content(first.region) == b"k" * REGION
    half.close()


def test_memory_is_tried_out_once_and_not_after_a_sleep(tmp_path):
    keeper = Keeper(tmp_path)
    kept = keeper.keep("r", REGION)
    half = WorkerHalf(tmp_path, "r", 0, kept)
    half.register(caches(1), BLOCKS, GROUPS)
    tried = content(kept.region)
    assert any(tried)
    half.unmap()
    half.register(caches(1), BLOCKS, GROUPS)
    assert isinstance(half.handshake({}).host_memory, Slots)
    assert content(kept.region) == tried
    half.close()


def test_memory_in_named_files_which_may_be_from_before_is_not_tried_out(tmp_path):
    (tmp_path / "files").mkdir(mode=0o700)
    assert not Keeper(tmp_path).keep("r", REGION, tmp_path / "files").new


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    with simulated(monkeypatch, 5) as (gpu, cuda_ipc):
        made = gpus.Tier(tmp_path, gpu, cuda_ipc)
        made.opened()
        made.writer.close()
        yield made
        made.writer.close()
        made.own.close()
        assert gpu.pinned == {}


def retried(tier, free=4):
    tier.writer = importlib.import_module(WRITER).CudaSlotWriter(tier.own, tier.slots, free)
    return tier.opened()


def test_a_gpu_uses_memory_that_gives_a_block_of_each_group_back_and_its_own_is_not_touched(gpu):
    assert retried(gpu).writer._slots.exception() is None
    assert all(torch.equal(gpu.tensors[name], each) for name, each in gpus.caches(1).items())
    with map_region(gpu.slots.memory.regions[0]) as mapped:
        stride = gpu.slots.memory.layers[0].stride
        assert any(mapped[4 * stride : 5 * stride])
        assert not any(mapped[: 4 * stride])
        assert not any(mapped[5 * stride :])


@pytest.mark.parametrize("way", ["there", "back"])
@pytest.mark.parametrize("group", sorted(set(gpus.GROUPS.values())))
def test_a_gpu_whose_copies_change_a_byte_stores_nothing_and_what_it_loses_is_told(gpu, monkeypatch, caplog, group, way):
    size = next(size for each, size in gpu.own._shape if each == group)
    layer = next(layer for layer in gpu.slots.memory.layers if layer.group == group)
    enqueue, tables = gpu.own._enqueue, []

    def changing(stream, given, *rest):
        tables.append(given)
        found = enqueue(stream, given, *rest)
        asked = (len(tables) - 1) // 2 == group
        if asked and way == ("there" if stream is gpu.own._to_host else "back"):
            place = next(each for each in given[1].t().tolist() if each[2] * 8 == size)
            address = place[0] + (4 * layer.stride if way == "there" else 0)
            stream.enqueue(lambda: ctypes.memset(address, ctypes.string_at(address, 1)[0] ^ 1, 1))
        return found

    monkeypatch.setattr(gpu.own, "_enqueue", changing)
    with caplog.at_level(logging.WARNING):
        retried(gpu)
        assert FAILED in str(gpu.writer._slots.exception())
        gpu.writer.begin(Stores((Store(1, 0, 0, gpus.key(0)),), frozenset()))
    assert gpu.writer.take_lost() == [0]  # which the tier counts
    assert gpu.writer.take_copied() == []
    assert FAILED in caplog.text
