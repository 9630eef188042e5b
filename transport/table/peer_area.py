"""The part of a block table that counts what its owner imported from each peer."""

from typing import Any

import numpy as np
import numpy.typing as npt

from transport.table.deliveries import OTHER_PEERS, PeerCounters
from transport.table.fence import fence

PEERS_MAX = 64
NAME_BYTES_MAX = 256
TRANSPORT_BYTES_MAX = 32
COUNTERS = 5  # imports, blocks, bytes, nanoseconds of the copies, failures
_NAME = 8
_TRANSPORT = _NAME + NAME_BYTES_MAX // 8
WORDS = _TRANSPORT + TRANSPORT_BYTES_MAX // 8
"""Words of 8 bytes in a row: 1 once its names are written, the counters, then from word 8 the names, padded with zeros."""


class PeerArea:
    """`rows` is uint64 (PEERS_MAX, WORDS) in the table's memory. A name, once written, keeps its row for the epoch."""

    def __init__(self, rows: npt.NDArray[np.uint64]) -> None:
        self._rows: Any = rows
        self._places: dict[str, int] = {}
        self._names: list[str] = []

    def place(self, name: str, transport: str) -> int:
        """Return the row of a peer, adding one for a new peer; peers without a row of their own share the last one."""
        known = self._places.get(name)
        if known is not None:
            return known
        place = len(self._places)
        if place >= PEERS_MAX - 1:
            place, name = PEERS_MAX - 1, OTHER_PEERS
        row = self._rows[place]
        row[_NAME:_TRANSPORT] = _words(name, NAME_BYTES_MAX)
        row[_TRANSPORT:WORDS] = _words(transport, TRANSPORT_BYTES_MAX)
        fence()
        row[0] = 1
        self._places[name] = place
        return place

    def add(self, place: int, blocks: int, size: int, nanoseconds: int, *, failed: bool) -> None:
        """Count an import that ended."""
        self._rows[place, 1 : 1 + COUNTERS] += np.array((1, blocks, size, nanoseconds, failed), np.uint64)

    def names(self) -> list[str]:
        """Return the peers' names by row, as a reader sees them."""
        known = int(np.count_nonzero(self._rows[:, 0]))
        fence()
        self._names += [_text(self._rows[place, _NAME:_TRANSPORT]) for place in range(len(self._names), known)]
        return self._names

    def counters(self) -> tuple[PeerCounters, ...]:
        """Return every peer's counters."""
        return tuple(self._counters(place, name) for place, name in enumerate(self.names()))

    def _counters(self, place: int, name: str) -> PeerCounters:
        imports, blocks, size, nanoseconds, failures = self._rows[place, 1 : 1 + COUNTERS].tolist()
        transport = _text(self._rows[place, _TRANSPORT:WORDS])
        return PeerCounters(name, transport, imports, blocks, size, nanoseconds / 1e9, failures)


def _words(text: str, size: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(text.encode("utf-8", "surrogateescape")[:size].ljust(size, b"\0"), np.uint64)


def _text(words: npt.NDArray[np.uint64]) -> str:
    return words.tobytes().rstrip(b"\0").decode("utf-8", "replace")
