"""Coded blocks between a simulated GPU and host memory, beside others in one store and in one import."""

import importlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.errors import TritonError

from engine.connector.worker import _codes
from engine.tiers.slots import cut
from engine.tiers.stores import Store, Stores
from tests.real.fleet import until
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.backends.simulated_gpu import WRITER, simulated
from tests.unit.transport.table_fixtures import description
from transport.backends.base import ImportJob
from transport.errors import MemoryUnreachable
from transport.frames import slot_codes
from transport.frames.layouts import attention, cpu_attention
from transport.frames.shape import Number
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.layout import Memory
from transport.table.quality import CODED, IN_CODE, LATER, LOSSY
from transport.table.reader import TableReader

BLOCKS, LAYERS, HEADS, TOKENS, WIDTH = 8, 2, 2, 8, 32
SHAPE = attention(LAYERS, HEADS, TOKENS, WIDTH, Number.BFLOAT16)
KEYS = chain_keys(root_key(b"f" * 16), range(8 * 64), 8)
BITS = LOSSY | CODED | IN_CODE


def key(place):
    return KEYS[place].tobytes()


def caches(seed=None):
    generator = torch.Generator().manual_seed(seed or 0)
    shape = (LAYERS, BLOCKS, HEADS, TOKENS, 2 * WIDTH)
    drawn = torch.randn(shape, generator=generator) if seed else torch.zeros(shape)
    return {f"layer.{number}": drawn[number].bfloat16().clone() for number in range(LAYERS)}


def content(tensors, block):
    return np.concatenate([tensor[block].contiguous().view(torch.uint8).numpy().reshape(-1) for tensor in tensors.values()])


def restored(before, codec="int8"):
    out = np.empty(SHAPE.nbytes, np.uint8)
    slot_codes.decode(codec, np.frombuffer(slot_codes.encode(codec, before, SHAPE), np.uint8), SHAPE, out)
    return out


class Tier:
    """An engine's tensors on the simulated GPU, and its slots with their table."""

    def __init__(self, path: Path, gpu, cuda_ipc, codec="int8") -> None:
        self.gpu, self.cuda_ipc = gpu, cuda_ipc
        self.tensors = caches(1)
        self.before = [content(self.tensors, block) for block in range(BLOCKS)]
        self.own = cuda_ipc.CudaIpcTransport(self.tensors, BLOCKS)
        assert _codes(self.own, SHAPE, codec)
        self.keeper = Keeper(path)
        kept = self.keeper.keep("r", 16 * SHAPE.nbytes)
        self.slots = cut(kept.region, self.own.memory(), 1, SHAPE, codec)
        self.writer = importlib.import_module(WRITER).CudaSlotWriter(self.own, self.slots)
        about = description("r.host-memory", transport="cuda_ipc", memories=(self.slots.memory,))
        self.table = KeptTable(path, about, 8, self.slots.count, Path(kept.draft))
        until(self.writer._slots.done, 20, "the slots are open", 0.001)

    def store(self, *stores):
        self.writer.begin(Stores(stores, frozenset(store.block for store in stores)))
        self.gpu.all()

    def restore(self, slots, targets):
        """Import slots into fresh tensors of another engine; return these and the result."""
        tensors = caches()
        taker = self.cuda_ipc.CudaIpcTransport(tensors, BLOCKS)
        with closing(TableReader(self.table.path)) as reader:
            taker.prepare(reader)
            until(taker._peer(reader).done, 20, "the memory is open", 0.001)
            ids, states = np.array(slots, np.int32), reader._states[slots]
            taker.start(
                ImportJob("q", reader.name, reader.epoch, ids, states, np.array(targets, np.int32)), reader, gently=True
            )
            self.gpu.all()
            (result,) = taker.poll()
        taker.close()
        return tensors, result

    def close(self):
        self.writer.close()
        self.own.close()
        assert self.gpu.pinned == {}


@pytest.fixture
def tier(tmp_path, monkeypatch):
    with simulated(monkeypatch) as (gpu, cuda_ipc):
        made = Tier(tmp_path, gpu, cuda_ipc)
        yield made
        made.close()


def test_coded_blocks_come_back_as_from_a_frame_and_others_beside_them_byte_for_byte(tier):
    tier.store(Store(1, 2, 0, key(0), BITS), Store(2, 4, 0, key(1)), Store(6, 3, 0, key(2), BITS))
    assert (sorted(tier.writer.take_copied()), tier.writer.take_lost()) == ([2, 3, 4], [])
    tier.table.publish([2, 4, 3], KEYS[:3], np.array([BITS, 0, BITS], np.uint64))
    tensors, result = tier.restore([2, 4, 3], [7, 1, 4])
    assert (result.failed_blocks, result.reason, result.bytes) == ((), "", 3 * SHAPE.nbytes)
    assert (content(tensors, 1) == tier.before[2]).all()
    for block, source in ((7, 1), (4, 6)):
        assert (content(tensors, block) == restored(tier.before[source])).all()
        assert (content(tensors, block) != tier.before[source]).any()
    assert not any(content(tensors, block).any() for block in (0, 2, 3, 5, 6))


@pytest.mark.parametrize("codec", ["rot4", "rot3"])
def test_blocks_that_are_rotated_take_one_slot_and_a_first_block_that_is_not_some_side_by_side(tmp_path, monkeypatch, codec):
    with simulated(monkeypatch) as (gpu, cuda_ipc):
        tier = Tier(tmp_path, gpu, cuda_ipc, codec)
        whole = tier.slots.memory.coded.whole
        assert whole > 2
        tier.store(Store(2, whole, 0, key(0)), Store(1, 2, 0, key(1), BITS | LATER), Store(6, 1, 0, key(2), BITS | LATER))
        assert (sorted(tier.writer.take_copied()), tier.writer.take_lost()) == ([1, 2, whole], [])
        tier.table.publish([whole, 2, 1], KEYS[:3], np.array([0, BITS | LATER, BITS | LATER], np.uint64))
        tensors, result = tier.restore([whole, 2, 1], [1, 7, 4])
        assert (result.failed_blocks, result.reason) == ((), "")
        assert (content(tensors, 1) == tier.before[2]).all()
        for block, source in ((7, 1), (4, 6)):
            assert (content(tensors, block) == restored(tier.before[source], codec)).all()
        tier.close()


def test_a_block_that_cannot_be_coded_is_lost_and_its_neighbour_is_not(tier):
    tier.tensors["layer.1"][3, 0, 0, 0] = float("inf")
    tier.store(Store(3, 0, 0, key(0), BITS), Store(4, 1, 0, key(1), BITS), Store(3, 2, 0, key(2)))
    assert (sorted(tier.writer.take_copied()), tier.writer.take_lost()) == ([1, 2], [0])


def test_layouts_that_the_kernels_do_not_take_are_not_coded(tier):
    assert not tier.own.codes(cpu_attention(LAYERS, HEADS, TOKENS, WIDTH, Number.BFLOAT16), "int8")
    assert not tier.own.codes(attention(LAYERS, HEADS, 2 * TOKENS, WIDTH, Number.BFLOAT16), "rot4")
    assert not tier.own.codes(attention(2 * LAYERS, HEADS // 2, TOKENS, WIDTH, Number.BFLOAT16), "rot3")


def test_where_a_kernel_does_not_compile_blocks_are_not_coded(tier, monkeypatch, caplog):
    def refused(*_):
        raise TritonError("no such shape")

    monkeypatch.setattr(tier.cuda_ipc, "encode", refused)
    assert not _codes(tier.own, SHAPE, "rot4")
    assert "the kernels of rot4 do not compile for this GPU: TritonError('no such shape')" in caplog.text


def test_coded_blocks_without_a_word_on_how_they_lie_or_beyond_their_memory_are_not_read(tier):
    tier.table.publish([2], KEYS[:1], BITS)
    with closing(TableReader(tier.table.path)) as reader:
        job = ImportJob("q", reader.name, reader.epoch, np.array([2], np.int32), reader._states[[2]], np.array([1], np.int32))
        memory = reader.memories[0]
        silent = Memory(0, memory.transport, memory.regions, memory.layers)
        taker = tier.cuda_ipc.CudaIpcTransport(caches(), BLOCKS)
        with pytest.raises(MemoryUnreachable, match="does not say"):
            taker.start(job, Told(reader, silent), gently=True)
        others = {"offset": memory.regions[0].size}, {"offset": -64}, {"stride": 8}, {"bytes": 1 << 20}, {"codec": "rot4"}
        for changes in others:
            fields = {name: getattr(memory.coded, name) for name in memory.coded.__struct_fields__} | changes
            wrong = Memory(0, memory.transport, memory.regions, memory.layers, None, type(memory.coded)(**fields))
            taker.start(job, Told(reader, wrong), gently=True)
            until(lambda wrong=wrong: taker._peer(Told(reader, wrong)).done(), 20, "it was looked at", 0.001)
            (result,) = taker.poll()
            assert "coded blocks that do not fit" in result.reason
            taker._peers.clear()
        taker.close()


class Told:
    """A table's reader that describes other memory."""

    def __init__(self, reader, memory) -> None:
        self.name, self.epoch, self.num_blocks, self.memories = reader.name, reader.epoch, reader.num_blocks, (memory,)
