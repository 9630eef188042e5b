"""What a table holds of a chain if the model has several KV cache groups: a length for steering, blocks for an import."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from transport.groups import Group, needed, supplied, unit
from transport.keys import Keys, group_keys
from transport.table.reader import TableReader

_CHUNK_BLOCKS = 256
"""Blocks that are looked up at once, from the end of a chain: more than a window has, so that mostly one look-up will do."""
_CHUNKS_MAX = 16
"""Chunks of which a search looks up more and more at once: a look-up's own cost is that of a hundred blocks."""
_FEW_BLOCKS = 8
"""As many blocks take less one by one than by a look-up of a chunk."""


class GroupChain:
    """The keys of a chain for each of a model's groups, made when they are asked for. `keys` have shape (n, 2)."""

    def __init__(self, groups: Sequence[Group], keys: Keys) -> None:
        self.groups = groups
        self.tokens = len(keys) * unit(groups)
        self._chain = keys
        self._keys: dict[int, Keys] = {}

    def keys(self, group: int) -> Keys:
        """Return the keys of a group's blocks, shape (blocks, 2)."""
        found = self._keys.get(group)
        if found is None:
            ratio = self.groups[group].block_size // unit(self.groups)
            found = self._keys[group] = np.ascontiguousarray(group_keys(self._chain, group, ratio))
        return found


class Holding(Protocol):
    """The part of a TableReader that a length takes."""

    def held_blocks(self, words: memoryview) -> int: ...
    def holds(self, low: int, high: int) -> bool: ...
    def look_up(self, keys: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32], npt.NDArray[np.uint64]]: ...


def held_tokens(table: Holding, chain: GroupChain, begin: int = 0) -> int:
    """Return how many leading tokens of a chain the table can supply to who has the first `begin`, which are as many at least.

    For steering: as good as `TableReader.held_blocks`.
    """
    return supplied(chain.groups, _Sighted(table, chain), begin, chain.tokens)


@dataclass(frozen=True, slots=True)
class Supply:
    """What a holder gives to a prefix so that it reaches `tokens`: the blocks' ids, int32 (n,), and states, uint64 (n,).

    They are in the order of the groups, `counts` of each.
    """

    tokens: int
    block_ids: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint64]
    counts: tuple[int, ...]


def supply(table: TableReader, chain: GroupChain, begin: int, end: int) -> Supply | None:
    """Return what the table holds now with which a prefix of `begin` tokens grows, at most to `end`; None if nothing.

    What is needed is looked up once: a block that is reallocated later fails the check after the copy.
    """
    seen = _Seen(table, chain)
    tokens = supplied(chain.groups, seen, begin, end)
    if tokens <= begin:
        return None
    parts = [seen.blocks(number, needed(group, begin, tokens)) for number, group in enumerate(chain.groups)]
    counts = tuple(len(ids) for ids, _ in parts)
    return Supply(tokens, np.concatenate([ids for ids, _ in parts]), np.concatenate([states for _, states in parts]), counts)


_Chunk = tuple[bytes, npt.NDArray[np.int32], npt.NDArray[np.uint64]]
"""Which of a chunk's blocks are held, a byte each, their ids and their states."""


class _Seen:
    """Blocks as they were when they were looked up first, in chunks that count from the chain's begin."""

    def __init__(self, table: Holding, chain: GroupChain) -> None:
        self._table = table
        self._chain = chain
        self._chunks: dict[tuple[int, int], _Chunk] = {}

    def run_end(self, group: int, begin: int, end: int) -> int:
        chunks = 1
        while begin < end:
            until = min(end, begin - begin % _CHUNK_BLOCKS + chunks * _CHUNK_BLOCKS)
            self._chunk(group, until - 1, begin)
            for first, last in _cut(begin, until):
                missing = self._chunk(group, first)[0].find(b"\0", first % _CHUNK_BLOCKS, last - first + first % _CHUNK_BLOCKS)
                if missing >= 0:
                    return first - first % _CHUNK_BLOCKS + missing
            begin = until
            chunks = min(4 * chunks, _CHUNKS_MAX)
        return end

    def last_missing(self, group: int, begin: int, end: int) -> int:
        return self._last(b"\0", group, begin, end)

    def last_held(self, group: int, begin: int, end: int) -> int:
        return self._last(b"\1", group, begin, end)

    def _last(self, held: bytes, group: int, begin: int, end: int) -> int:
        """Return the last of the blocks from `begin` to before `end` that is held, or is not; -1 if there is none."""
        chunks = 1
        while end > begin:
            start = (end - 1) // _CHUNK_BLOCKS * _CHUNK_BLOCKS
            first = max(begin, start - (chunks - 1) * _CHUNK_BLOCKS)
            place = self._chunk(group, end - 1, first)[0].rfind(held, max(begin - start, 0), end - start)
            if place >= 0:
                return start + place
            end = start
            chunks = min(4 * chunks, _CHUNKS_MAX)
        return -1

    def blocks(self, group: int, wanted: range) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
        """Return ids and states of blocks that were found."""
        ids, states = [np.empty(0, np.int32)], [np.empty(0, np.uint64)]
        for first, last in _cut(wanted.start, wanted.stop):
            _, found, seen = self._chunk(group, first)
            place = slice(first % _CHUNK_BLOCKS, last - first + first % _CHUNK_BLOCKS)
            ids.append(found[place])
            states.append(seen[place])
        return np.concatenate(ids), np.concatenate(states)

    def _chunk(self, group: int, block: int, first: int | None = None) -> _Chunk:
        """Return the chunk that `block` lies in; if it is not known, look it up together with those from block `first` on."""
        number = block // _CHUNK_BLOCKS
        seen = self._chunks.get((group, number))
        if seen is None:
            begin = number if first is None else first // _CHUNK_BLOCKS
            keys = self._chain.keys(group)[begin * _CHUNK_BLOCKS : (number + 1) * _CHUNK_BLOCKS]
            held, ids, states = self._table.look_up(keys)
            for each in range(begin, number + 1):
                part = slice((each - begin) * _CHUNK_BLOCKS, (each - begin + 1) * _CHUNK_BLOCKS)
                self._chunks.setdefault((group, each), (held[part].tobytes(), ids[part], states[part]))
            seen = self._chunks[group, number]
        return seen


class _Sighted(_Seen):
    """For a length alone: full attention by bisection, a state or a few blocks one by one."""

    def run_end(self, group: int, begin: int, end: int) -> int:
        return begin + self._table.held_blocks(self._chain.keys(group)[begin:end].reshape(-1).data)

    def last_missing(self, group: int, begin: int, end: int) -> int:
        if end - begin > _FEW_BLOCKS:
            return super().last_missing(group, begin, end)
        words, holds = self._chain.keys(group).reshape(-1).data, self._table.holds
        return next((block for block in range(end - 1, begin - 1, -1) if not holds(words[2 * block], words[2 * block + 1])), -1)


def _cut(begin: int, end: int) -> list[tuple[int, int]]:
    """Cut the blocks from `begin` to before `end` where chunks begin."""
    starts = [begin, *range(begin // _CHUNK_BLOCKS * _CHUNK_BLOCKS + _CHUNK_BLOCKS, end, _CHUNK_BLOCKS)] if begin < end else []
    return list(zip(starts, [*starts[1:], end], strict=True)) if starts else []
