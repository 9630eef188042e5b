"""The journal of a block table: which blocks changed lately, so that a reader follows a table without scanning its states.

A ring of block ids; `head` counts all that were ever noted. The owner notes a block after its state changed, and raises `head`
after the ids are in place. It writes at most PIECE ids at a time: a reader that is closer to the head than the ring's size less
PIECE reads nothing that is being overwritten. One that fell further behind looks at every block once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transport.table.fence import fence

ENTRIES = 1 << 14
PIECE = ENTRIES // 4


class Journal:
    """`head` is uint64 (1,), `ring` uint32 (ENTRIES,), both in the table's memory. Only the owner has one."""

    def __init__(self, head: npt.NDArray[np.uint64], ring: npt.NDArray[np.uint32]) -> None:
        self._head: Any = head
        self._ring = ring

    def note(self, blocks: npt.NDArray[np.int64] | Sequence[int]) -> None:
        """These blocks have another state now."""
        ids = np.asarray(blocks, np.uint32)
        for begin in range(0, len(ids), PIECE):
            piece = ids[begin : begin + PIECE]
            head = int(self._head[0])
            start = head % ENTRIES
            room = ENTRIES - start
            self._ring[start : start + len(piece)] = piece[:room]
            self._ring[: max(0, len(piece) - room)] = piece[room:]
            fence()
            self._head[0] = head + len(piece)

    def note_all(self) -> None:
        """Any block may have another state now: every reader looks at all of them."""
        self._head[0] += np.uint64(ENTRIES)


class JournalReader:
    """The same journal as others read it: `head` is one word in the table's memory, how many changes were noted so far."""

    def __init__(self, head: memoryview, ring: npt.NDArray[np.uint32]) -> None:
        self.head = head
        self._ring = ring

    def since(self, after: int) -> npt.NDArray[np.int64] | None:
        """Return the blocks noted behind number `after`, each once; None if that cannot be told any more: look at all."""
        head = self.head[0]
        if not 0 <= head - after <= ENTRIES - PIECE:
            return None
        fence()
        start, count = after % ENTRIES, head - after
        first = self._ring[start : start + count].copy()
        rest = self._ring[: count - len(first)].copy()
        fence()
        if self.head[0] - after > ENTRIES - PIECE:
            return None
        return np.unique(np.concatenate((first, rest))).astype(np.int64)
