"""Copies blocks out of an owner's memory for another node, and checks each of them before anything is sent.

What is sent is a copy, so what an engine overwrites later was sent as it was; `sendfile` sends pages, and would send the new.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transport.backends.shared_memory import checksum, map_region
from transport.errors import MemoryUnreachable
from transport.node.decoding import CodedMemory, Decoder
from transport.node.messages import BLOCKS_ASKED_MAX, BlocksAsked, Checked, NodeError
from transport.table.layout import CHECKSUM_BYTES, Checksums, Memory
from transport.table.quality import in_code
from transport.table.reader import TableReader

CHUNK_BYTES = 2 << 20
_ONE = np.uint64(1)


class Chunk(NamedTuple):
    """Blocks, `content` uint8 (n, bytes), and which of them are good, (n,); what is not good is zeros."""

    content: npt.NDArray[np.uint8]
    good: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's blocks, uint8 (blocks, bytes), in the owner's memory, and where they go in a block's bytes."""

    blocks: npt.NDArray[np.uint8]
    begin: int
    end: int


class OwnerMemory:
    """One rank's memory of a table's owner, mapped; what lies coded in it is read with a `decoder` alone.

    Raises MemoryUnreachable if it cannot be, or is not as described.
    """

    def __init__(self, reader: TableReader, rank: int, decoder: Decoder | None = None) -> None:
        memory = next((m for m in reader.memories if m.rank == rank and m.transport == "shared_memory"), None)
        if memory is None:
            raise MemoryUnreachable(f"{reader.name} offers no memory that this node could read for rank {rank}")
        self.memory = memory
        self._maps = tuple(map_region(region) for region in memory.regions)
        self._layers: dict[int, list[_Layer]] = {}
        for layer in memory.layers:
            layers = self._layers.setdefault(layer.group, [])
            begin = layers[-1].end if layers else 0
            layers.append(_Layer(self._view(reader, memory, layer.region, layer.offset, layer.stride, layer.bytes), begin,
                                 begin + layer.bytes))  # fmt: skip
        self._sums = memory.checksums
        self._said = None if self._sums is None else self._sums_view(reader, memory, self._sums)
        coded = memory.coded is not None and decoder is not None
        self.coded = CodedMemory(reader, memory, self._maps, decoder) if coded and decoder is not None else None

    def _view(
        self, reader: TableReader, memory: Memory, region: int, offset: int, stride: int, size: int
    ) -> npt.NDArray[np.uint8]:
        if not 0 <= region < len(self._maps) or offset < 0 or stride < size or size <= 0:
            raise MemoryUnreachable(f"{reader.name} describes a layer that does not fit its memory")
        mapped: mmap.mmap = self._maps[region]
        if offset + (reader.num_blocks - 1) * stride + size > len(mapped):
            raise MemoryUnreachable(f"{reader.name} describes a layer that ends beyond its memory")
        return np.ndarray((reader.num_blocks, size), np.uint8, mapped, offset, (stride, 1))

    def _sums_view(self, reader: TableReader, memory: Memory, sums: Checksums) -> npt.NDArray[np.uint8]:
        return self._view(reader, memory, sums.region, sums.offset, sums.stride, CHECKSUM_BYTES)

    def block_bytes(self, group: int) -> int:
        """Return the bytes of a block of a group. Raises NodeError for a group that does not exist."""
        layers = self._layers.get(group)
        if not layers:
            raise NodeError(f"there is no KV cache group {group}")
        return layers[-1].end

    def copied(self, ids: npt.NDArray[np.int64], group: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of blocks of a group, uint8 (n, bytes), as they are now."""
        found = np.empty((len(ids), self.block_bytes(group)), np.uint8)
        in_a_row = len(ids) > 0 and bool((np.diff(ids) == 1).all())
        which = slice(int(ids[0]), int(ids[-1]) + 1) if in_a_row else ids  # a slice is copied once, a list twice
        for layer in self._layers[group]:
            found[:, layer.begin : layer.end] = layer.blocks[which]
        return found

    def intact(self, reader: TableReader, ids: npt.NDArray[np.int64], content: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """Tell which blocks match the checksums stored beside them; all, where there are none."""
        if self._said is None:
            return np.ones(len(ids), np.bool_)
        return np.array(
            [
                checksum(memoryview(content[place]), reader.key(block)) == self._said[block].tobytes()
                for place, block in enumerate(ids.tolist())
            ],
            np.bool_,
        )

    def said(self, reader: TableReader, ids: npt.NDArray[np.int64]) -> tuple[bytes, bytes]:
        """Return the checksums that are stored beside blocks, and the blocks' keys; neither where there are none."""
        if self._said is None:
            return b"", b""
        return self._said[ids].tobytes(), np.ascontiguousarray(reader.content(ids)[1]).astype("<u8", copy=False).tobytes()


def questioned(asked: BlocksAsked, num_blocks: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64], tuple[int, ...]]:
    """Return ids, states, and counts by group, of a table with `num_blocks`. Raises NodeError if the question cannot be."""
    if len(asked.ids) % 4 or len(asked.ids) > 4 * BLOCKS_ASKED_MAX or len(asked.states) != 2 * len(asked.ids):
        raise NodeError("ids and states of blocks that do not fit together")
    ids = np.frombuffer(asked.ids, "<u4").astype(np.int64)
    states = np.frombuffer(asked.states, "<u8")
    counts = asked.counts or (len(ids),)
    if sum(counts) != len(ids) or min(counts) < 0:
        raise NodeError("counts of blocks that do not fit together")
    if len(ids) and int(ids.max()) >= num_blocks:
        raise NodeError("a block beyond the table")
    return ids, states, counts


def chunks(reader: TableReader, memory: OwnerMemory, asked: BlocksAsked) -> Iterator[Chunk]:
    """Yield the blocks that are asked for, in their order. Raises NodeError if the question cannot be."""
    ids, states, counts = questioned(asked, reader.num_blocks)
    for group, begin, end in steps(memory, counts):
        yield copied_chunk(reader, memory, asked.epoch, ids[begin:end], states[begin:end], group)


def steps(memory: OwnerMemory, counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (group, begin, end) for pieces of some CHUNK_BYTES of blocks that are asked for, `counts` of each group."""
    first = 0
    for group, count in enumerate(counts):
        each = max(1, CHUNK_BYTES // memory.block_bytes(group)) if count else 1
        for begin in range(first, first + count, each):
            yield group, begin, min(begin + each, first + count)
        first += count


def copied_chunk(
    reader: TableReader,
    memory: OwnerMemory,
    epoch: int,
    ids: npt.NDArray[np.int64],
    states: npt.NDArray[np.uint64],
    group: int,
) -> Chunk:
    """Return blocks as they are now, and which of them are still in these `states`, (n,), in this epoch."""
    content = memory.copied(ids, group)
    good = memory.intact(reader, ids, content)
    coded = np.flatnonzero(in_code(states))
    if len(coded):
        good[coded] = memory.coded is not None and memory.coded.decode(reader, ids, content, coded)
    # last of all: what changed until here is not what was looked up
    good &= _unchanged(reader, epoch, ids, states)
    if not good.all():
        content[~good] = 0
    return Chunk(content, good)


def checked(reader: TableReader, memory: OwnerMemory, asked: BlocksAsked) -> Checked:
    """Tell which blocks, that somebody copied before, are still what was asked for. Raises NodeError as `chunks` does."""
    ids, states, _ = questioned(asked, reader.num_blocks)
    sums, keys = memory.said(reader, ids)
    good = _unchanged(reader, asked.epoch, ids, states) & ~in_code(states)  # of what lies coded no block was read
    return Checked(good.tobytes(), sums, keys)


def _unchanged(
    reader: TableReader, epoch: int, ids: npt.NDArray[np.int64], states: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    good: npt.NDArray[np.bool_] = (states & _ONE == 0) & reader.unchanged(ids.astype(np.int32), states)
    if reader.epoch != epoch or not reader.alive():
        good[:] = False
    return good
