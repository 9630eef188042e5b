"""Token ids of recent pieces of text, bounded in bytes."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock

from gateway.token_ids import TokenIds

ENTRY_BYTES = 310
"""Measured size of an entry without its ids: the key, the objects, and its place in an ordered dictionary."""


class IdCache:
    """Ids by keys that identify their text; the least recently used are dropped first. Thread safe.

    Keys are digests that nobody can forge, so no text is kept and none can be mistaken for another.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[bytes, TokenIds] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """Bytes held, including keys and bookkeeping."""
        return self._bytes

    def get(self, keys: Sequence[bytes]) -> list[TokenIds | None]:
        """Return the ids for each of `keys`, None where there are none."""
        with self._lock:
            entries = self._entries
            found = list(map(entries.get, keys))
            for key, ids in zip(keys, found, strict=True):
                if ids is not None:
                    entries.move_to_end(key)
        return found

    def put(self, entries: Iterable[tuple[bytes, TokenIds]]) -> None:
        """Store ids under their keys, dropping the oldest others."""
        with self._lock:
            for key, ids in entries:
                former = self._entries.pop(key, None)
                if former is not None:
                    self._bytes -= former.held_bytes + ENTRY_BYTES
                self._bytes += ids.held_bytes + ENTRY_BYTES
                self._entries[key] = ids
            while self._bytes > self._bytes_max:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.held_bytes + ENTRY_BYTES
