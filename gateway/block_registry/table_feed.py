"""Keeps the index of holders true to the block tables: what their journals name is looked at again, nothing else.

A table that appears is taken in piece by piece, so that a gateway that starts beside full caches serves at once; until all of
it is in, the table itself is asked.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gateway.block_registry.holder_index import HolderIndex
from transport.keys import Keys

PIECE_BLOCKS = 4096
"""Blocks of tables that are coming or going taken in at once, by a request that is being decided or by the fill beside it."""
FEW_TABLES, AGE_SECONDS_MAX = 64, 0.005
"""Of more tables it is not asked each time whether they changed: that is a quarter of a millisecond for 1,024. What is known of
them is so old at most."""
_ONE = np.uint64(1)


class Journal(Protocol):
    """What is needed of a `transport.table.journal.JournalReader`."""

    @property
    def head(self) -> memoryview: ...
    def since(self, after: int) -> npt.NDArray[np.int64] | None: ...


class FollowedTable(Protocol):
    """What is needed of a table to follow it."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def journal(self) -> Journal: ...
    def content(self, blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], Keys]: ...


@dataclass(slots=True)
class _Followed:
    """A table at its place in the index. `lows` are the first words of its blocks' keys there, 0 where it has none.

    Blocks from `taken_in` on were not looked at yet; `head` is the number of the journal's last change that was.
    """

    name: str
    table: FollowedTable
    word: memoryview
    place: int
    lows: npt.NDArray[np.uint64]
    head: int
    taken_in: int = 0


class TableFeed:
    """Follows tables by name, each the same object as long as it lives. Belongs to the tables' thread."""

    def __init__(self, index: HolderIndex, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due = 0.0
        self._index = index
        self._followed: dict[str, _Followed] = {}
        self._coming: deque[str] = deque()
        self._going: deque[tuple[int, npt.NDArray[np.uint64]]] = deque()
        self._names: dict[int, str] = {}
        self._whole = 0

    @property
    def names(self) -> Mapping[int, str]:
        """The table at each place."""
        return self._names

    @property
    def whole(self) -> int:
        """The places, as bits, of the tables that are taken in completely."""
        return self._whole

    @property
    def filling(self) -> bool:
        """Whether a table is still coming or going."""
        return bool(self._coming or self._going)

    def place(self, name: str) -> int:
        """Return the place of a table that is followed. Raises KeyError."""
        return self._followed[name].place

    def follow(self, tables: Mapping[str, FollowedTable]) -> None:
        """Follow these from now on, and no others."""
        for name in [name for name, known in self._followed.items() if tables.get(name) is not known.table]:
            gone = self._followed.pop(name)
            self._whole &= ~(1 << gone.place)
            del self._names[gone.place]
            self._going.append((gone.place, gone.lows))
        for name, table in tables.items():
            if name not in self._followed:
                place, word = self._index.take_place(), table.journal.head
                self._followed[name] = _Followed(name, table, word, place, np.zeros(table.num_blocks, np.uint64), word[0])
                self._names[place] = name
                self._coming.append(name)

    def refresh(self) -> None:
        """Take in what changed; a piece of what is coming or going too."""
        if len(self._followed) <= FEW_TABLES or self._clock() >= self._due:
            for followed in [each for each in self._followed.values() if each.word[0] != each.head]:
                self._changed(followed)
            self._due = self._clock() + AGE_SECONDS_MAX
        if self._coming or self._going:
            self.fill()

    def look_again(self) -> None:
        """Have the next refresh ask all tables, however lately they were asked."""
        self._due = 0.0

    def fill(self) -> None:
        """Take in one more piece of a table that is coming, or give up one of a table that went."""
        if self._coming:
            name = self._coming[0]
            followed = self._followed.get(name)
            if followed is not None and self._take_in(followed):
                return
            self._coming.popleft()
        elif self._going:
            place, lows = self._going.popleft()
            now, later = lows[:PIECE_BLOCKS], lows[PIECE_BLOCKS:]
            self._index.remove(place, now[now != 0].tolist())
            if len(later):
                self._going.appendleft((place, later))
            else:
                self._index.free_place(place)

    def _take_in(self, followed: _Followed) -> bool:
        """Look at the next blocks for the first time; False once there are none."""
        begin = followed.taken_in
        end = followed.taken_in = min(begin + PIECE_BLOCKS, len(followed.lows))
        if begin < end:
            self._look_at(followed, np.arange(begin, end))
        if end == len(followed.lows):
            self._whole |= 1 << followed.place
        return end < len(followed.lows)

    def _changed(self, followed: _Followed) -> None:
        head = followed.word[0]  # what changes from here on is noted behind it
        blocks = followed.table.journal.since(followed.head)
        followed.head = head
        if blocks is None:  # too much to follow: begin anew, the table is asked meanwhile
            self._whole &= ~(1 << followed.place)
            followed.taken_in = 0
            if followed.name not in self._coming:
                self._coming.append(followed.name)
            return
        self._look_at(followed, blocks[blocks < followed.taken_in])

    def _look_at(self, followed: _Followed, blocks: npt.NDArray[np.int64]) -> None:
        states, keys = followed.table.content(blocks)
        now = np.where(states & _ONE == 0, keys[:, 0], 0)
        before = followed.lows[blocks]
        other = now != before
        self._index.remove(followed.place, _some(before[other]))
        self._index.add(followed.place, _some(now[other]))
        followed.lows[blocks] = now


def _some(lows: npt.NDArray[np.uint64]) -> list[int]:
    found: list[int] = lows[lows != 0].tolist()
    return found
