"""The memory that an agent puts fetched blocks into, for the engines of its node. Plain bookkeeping, no sockets.

A piece that was given to a fetch stays out of use until the fetch has ended *and* its engine has let go of it *and* nothing
that was begun can write it any more: a late byte hits memory that nobody reads, never blocks that an engine took back.
"""

import os
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from transport.backends.shared_memory import map_region, region_of
from transport.table.layout import Region


class Writing(Protocol):
    """Something that was begun, cannot be taken back, and writes memory until it is over."""

    @property
    def over(self) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Slots of `stride` bytes each, from slot `first` on, as uint8 (count, stride). `writing` may write them."""

    first: int
    stride: int
    rows: npt.NDArray[np.uint8]
    writing: list[Writing] = field(default_factory=list)

    @property
    def begin(self) -> int:
        """Where it begins in the memory, bytes."""
        return self.first * self.stride

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.begin + self.rows.size

    def part(self, begin: int, stop: int) -> "Piece":
        """Return some of its slots; what writes them writes this one."""
        return Piece(self.first + begin, self.stride, self.rows[begin:stop], self.writing)


class Staging:
    """`size` bytes without a name, which engines open by `region`. Raises OSError if they cannot be had. One thread's."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("peerkv-staging", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self.region: Region = region_of(self._fd, size)
        self._map = map_region(self.region, writable=True)
        self._taken: list[Piece] = []
        self._quarantined: list[Piece] = []

    def taken_bytes(self) -> int:
        """Return the bytes that are in use, or could still be written; what cannot be any more is free from now on."""
        self._end_quarantine()
        return sum(piece.rows.size for piece in self._taken)

    def take(self, count: int, stride: int) -> Piece | None:
        """Return `count` slots of `stride` bytes, or as many as there is room for in one piece; None if there is none."""
        self._end_quarantine()
        begin, best, most = 0, 0, 0
        for piece in [*self._taken, None]:
            end = self.region.size if piece is None else piece.begin
            first = -(-begin // stride)
            room = end // stride - first
            if room > most:
                best, most = first, room
                if room >= count:
                    break
            if piece is not None:
                begin = piece.end
        count = min(count, most)
        if count <= 0:
            return None
        rows = np.ndarray((count, stride), np.uint8, self._map, best * stride)
        taken = Piece(best, stride, rows)
        self._taken.append(taken)
        self._taken.sort(key=lambda piece: piece.begin)
        return taken

    def give_back(self, piece: Piece) -> None:
        """Nobody reads it any more. It is taken again once nothing can write it either."""
        self._quarantined.append(piece)

    def _end_quarantine(self) -> None:
        free = [piece for piece in self._quarantined if all(each.over for each in list(piece.writing))]
        if free:
            self._quarantined = [piece for piece in self._quarantined if piece not in free]
            self._taken = [piece for piece in self._taken if piece not in free]

    def close(self) -> None:
        """Nobody can open it any more; it goes when nobody has it mapped."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
