"""A replica's block table, as its owner writes it: which prefix blocks it holds right now, in memory that anyone can map."""

import contextlib
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from transport.errors import TableError
from transport.int32 import int32_array
from transport.keys import Keys
from transport.table import liveness
from transport.table.deliveries import Delivery
from transport.table.fence import fence
from transport.table.layout import (
    BLOCKS_MAX,
    COUNTERS,
    COUNTERS_OFFSET,
    DESCRIPTION_BYTES_MAX,
    HEADER,
    HEARTBEAT_OFFSET,
    LOAD_OFFSET,
    MAGIC,
    PAGE_BYTES,
    SUFFIX,
    VALID_OFFSET,
    VERSION,
    WAYS,
    Description,
    Layout,
    areas,
    bucket_count,
)
from transport.table.quality import CARRIED, with_quality
from transport.table.waiting_area import WaitingArea

_COUNTER_INDEX = {name: index for index, name in enumerate(COUNTERS)}
_ONE = np.uint64(1)
_CARRIED = np.uint64(CARRIED)
Blocks = Sequence[int] | npt.NDArray[np.integer[Any]]
"""Block ids; as an array they are taken as they are."""


class TableWriter:
    """The owner's side. Not thread safe: one thread, the scheduler's, calls it.

    Creates `directory/<replica>.table` under a temporary name and renames it when it is whole. The file belongs to this
    process until `close`, which removes it, or until nobody refers to this object: a table without a writer must not look
    alive. Raises TableError if the replica's name is taken by a live process, OSError if the directory or its memory is not
    available.
    """

    _lock = -1

    def __init__(
        self, directory: Path, description: Description, block_size: int, blocks: int, epoch: int | None = None
    ) -> None:
        encoded = msgspec.json.encode(description)
        if not 0 < blocks <= BLOCKS_MAX or len(encoded) > DESCRIPTION_BYTES_MAX:
            raise TableError(f"a table of {blocks} blocks with {len(encoded)} bytes of description is out of bounds")
        self.layout = Layout(blocks, bucket_count(blocks), len(encoded))
        self.path = directory / (description.replica + SUFFIX)
        self.epoch = time.time_ns() if epoch is None else epoch
        self._mask = np.uint64(self.layout.buckets - 1)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open(directory, description, block_size, encoded)

    def _open(self, directory: Path, description: Description, block_size: int, encoded: bytes) -> None:
        _refuse_if_claimed(self.path)
        draft = directory / f".{description.replica}.{os.getpid()}.{self.epoch}"
        # the lock has a descriptor of its own: mmap keeps a duplicate of the one it is given, which would keep the lock
        self._lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if not liveness.claim(self._lock):
                raise TableError(f"{draft} is locked by another process")
            os.posix_fallocate(self._lock, 0, self.layout.total)
            fd = os.open(draft, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._map = mmap.mmap(fd, self.layout.total)
            finally:
                os.close(fd)
            self._fill(block_size, encoded)
            os.rename(draft, self.path)
        except BaseException:
            self._forget()
            draft.unlink(missing_ok=True)
            raise
        this = weakref.ref(self)  # registered memory is never released
        os.register_at_fork(after_in_child=lambda: _forget_in_child(this))

    def _fill(self, block_size: int, encoded: bytes) -> None:
        layout = self.layout
        HEADER.pack_into(
            self._map, 0, MAGIC, VERSION, PAGE_BYTES, self.epoch, block_size, layout.blocks, layout.buckets, WAYS,
            layout.description_bytes,
        )  # fmt: skip
        self._map[PAGE_BYTES : PAGE_BYTES + len(encoded)] = encoded
        self._view()
        self._states[:] = 1

    def _view(self) -> None:
        self._words = memoryview(self._map)[:PAGE_BYTES].cast("Q")
        self.waiting = WaitingArea(self._words)
        self._states, self._keys, self._index, self._peers, self._deliveries, self._journal = areas(self._map, self.layout)

    def offered(self, blocks: Sequence[int]) -> tuple[list[int], Keys]:
        """Return which of `blocks` are on offer, in their order and each once, and their keys, shape (n, 2)."""
        ids = np.array(list(dict.fromkeys(blocks)), np.int64)
        ids = ids[self._states[ids] & _ONE == 0]
        return ids.tolist(), self._keys[ids]

    def quality(self, blocks: Sequence[int]) -> list[int]:
        """Return the bits of `quality.py` that each of `blocks`, which are on offer, was published with."""
        found: list[int] = (self._states[np.asarray(blocks, np.int64)] & _CARRIED).tolist()
        return found

    def publish(self, blocks: Blocks, keys: Keys, quality: int | npt.NDArray[np.uint64] = 0) -> None:
        """Offer `blocks`, all different, under `keys`, shape (len(blocks), 2): their content is complete until `invalidate`.

        `quality` are the bits of `quality.py`, of all blocks or of each; 0: exact.
        """
        ids = _ids(blocks)
        offered = self._states[ids] & _ONE == 0
        if offered.any():
            same = offered & (self._keys[ids] == keys).all(axis=1)
            self.invalidate(ids[offered & ~same])
            lost = same & ~self._indexed(ids, keys)
            self._index_add(ids[lost], keys[lost])
            ids, keys = ids[~same], keys[~same]
            quality = quality if isinstance(quality, int) else quality[~same]
        self._keys[ids] = keys
        fence()
        self._states[ids] = with_quality(self._states[ids], quality) + _ONE
        self._index_add(ids, keys)
        self._journal.note(ids)
        self._words[VALID_OFFSET // 8] += len(ids)
        self.count("published_blocks", len(ids))

    def invalidate(self, blocks: Blocks) -> int:
        """Withdraw `blocks` before their memory is written again; return how many had been on offer."""
        ids = _ids(blocks)
        ids = ids[self._states[ids] & _ONE == 0]
        if len(ids):
            ids, _ = np.unique(
                ids, return_index=True
            )  # sorts; without the index numpy 2.3 hashes, which takes four times as long
            self._states[ids] += _ONE
            fence()
            buckets = (self._keys[ids, 0] & self._mask).view(np.int64)
            way, found = _first(self._index.take(buckets, axis=0) == (ids + 1)[:, None])
            self._index[buckets[found], way[found]] = 0
            self._words[VALID_OFFSET // 8] -= len(ids)
            self._journal.note(ids)
        return len(ids)

    def clear(self) -> int:
        """Withdraw every block; return how many had been on offer."""
        return self.invalidate(np.flatnonzero(self._states & _ONE == 0))

    def _indexed(self, ids: npt.NDArray[np.int64], keys: Keys) -> npt.NDArray[np.bool_]:
        buckets = (keys[:, 0] & self._mask).view(np.int64)
        return _first(self._index.take(buckets, axis=0) == (ids + 1)[:, None])[1]

    def _index_add(self, ids: npt.NDArray[np.int64], keys: Keys) -> None:
        """Enter blocks in their buckets; if one is full, `_displaced` says which entry makes room."""
        buckets = (keys[:, 0] & self._mask).view(np.int64)
        while len(ids):
            first: Any = (
                slice(1) if len(ids) == 1 else np.unique(buckets, return_index=True)[1]
            )  # one per bucket each time around
            some, into = ids[first], buckets[first]
            way, found = _first(self._index.take(into, axis=0) == 0)
            for place in np.flatnonzero(~found).tolist():
                way[place] = self._displaced(int(into[place]), int(some[place]))
            self._index[into, way] = some + 1
            left = np.ones(len(ids), np.bool_)
            left[first] = False
            ids, buckets = ids[left], buckets[left]

    def _displaced(self, bucket: int, block: int) -> int:
        """Return which entry of a full bucket makes room for `block`: one whose key another entry has too, if there is one.

        Requests that generate the same text fill blocks of their own with the same keys; kept all, they would push the only
        entry of some other key out, and with it the rest of a prefix (seen on a GPU).
        """
        entries = self._index[bucket].astype(np.int64) - 1
        seen = {self._keys[block].tobytes()}
        for way in range(WAYS - 1, -1, -1):
            key = self._keys[entries[way]].tobytes()
            if key in seen:
                return way
            seen.add(key)
        return block % WAYS

    def count(self, counter: str, amount: int = 1) -> None:
        """Add `amount` to a counter named in COUNTERS."""
        self._words[COUNTERS_OFFSET // 8 + _COUNTER_INDEX[counter]] += amount

    def beat(self, now_ns: int) -> None:
        """Record the time of a step, CLOCK_MONOTONIC nanoseconds."""
        self._words[HEARTBEAT_OFFSET // 8] = now_ns

    def tell_load(self, load: Sequence[int]) -> None:
        """Record the load: the leading fields of an EngineLoad, in its order."""
        words, first = self._words, LOAD_OFFSET // 8
        for place, value in enumerate(load, first):
            words[place] = value

    def deliver(self, delivery: Delivery, transport: str) -> None:
        """Append a delivery record; `transport` is how its sources, if it has any, are read.

        Raises ValueError for more sources, or tokens from one, than there can be.
        """
        source = self._peers.place(delivery.source, transport) if delivery.source else -1
        self._deliveries.write(delivery, source, [self._peers.place(each.source, transport) for each in delivery.further])

    def imported(self, source: str, transport: str, *, blocks: int, size: int, nanoseconds: int, failed: bool) -> None:
        """Count an import of `blocks` good blocks and `size` copied bytes from a peer."""
        self._peers.add(self._peers.place(source, transport), blocks, size, nanoseconds, failed=failed)

    def __del__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Let go of the lock, which in a forked child is a copy that would outlive the owner."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def close(self) -> None:
        """Withdraw everything, remove the file and end the epoch. Idempotent; nothing happens in a forked child."""
        if self._lock < 0:
            return
        try:
            self.clear()
        finally:
            self.end()

    def end(self) -> None:
        """Remove the file and end the epoch, whatever the table says. Idempotent."""
        if self._lock < 0:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self.path).st_ino == os.fstat(self._lock).st_ino:
                os.unlink(self.path)
        self._forget()


def _first(rows: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the place of the first that is true in each of the rows, and whether any is."""
    place = rows.argmax(axis=1)
    return place, rows[np.arange(len(rows)), place]


def _ids(blocks: Blocks) -> npt.NDArray[np.int64]:
    return (blocks if isinstance(blocks, np.ndarray) else int32_array(blocks)).astype(np.int64)


def _forget_in_child(table: "weakref.ref[TableWriter]") -> None:
    writer = table()
    if writer is not None:
        writer._forget()


def _refuse_if_claimed(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if liveness.claimed(fd):
            raise TableError(f"{path} belongs to a live replica: give this one another name or another directory")
    finally:
        os.close(fd)
