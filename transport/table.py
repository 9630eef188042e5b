"""A replica's block table: which prefix blocks it holds right now, in memory that everyone on the node can map.

One writer, the replica's scheduler; any number of readers, which take no lock and send no message. A reader believes a block
only if its state is even before and after its key was read, and a copy of it only if the state is still the same afterwards.
"""

import contextlib
import mmap
import os
import stat
import struct
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from transport import liveness
from transport.errors import TableError
from transport.fence import fence
from transport.fingerprint import fingerprint_digest
from transport.keys import Keys
from transport.table_layout import (
    BLOCKS_MAX,
    COUNTERS,
    COUNTERS_OFFSET,
    DESCRIPTION_BYTES_MAX,
    HEADER,
    HEARTBEAT_OFFSET,
    MAGIC,
    PAGE_BYTES,
    VALID_OFFSET,
    VERSION,
    WAYS,
    Description,
    Layout,
    Memory,
    bucket_count,
)

__all__ = ["COUNTERS", "SUFFIX", "Run", "TableReader", "TableWriter"]

SUFFIX = ".table"
_COUNTER_INDEX = {name: index for index, name in enumerate(COUNTERS)}
_CHUNK_BLOCKS_MAX = 4096
_ONE = np.uint64(1)


class TableWriter:
    """The owner's side. Not thread safe: one thread, the scheduler's, calls it.

    Creates `directory/<replica>.table` under a temporary name and renames it when it is whole. The file belongs to this
    process until `close`, which removes it. Raises TableError if the replica's name is taken by a live process, OSError if the
    directory or its memory is not to be had.
    """

    def __init__(self, directory: Path, description: Description, block_size: int, blocks: int) -> None:
        encoded = msgspec.json.encode(description)
        if not 0 < blocks <= BLOCKS_MAX or len(encoded) > DESCRIPTION_BYTES_MAX:
            raise TableError(f"a table of {blocks} blocks with {len(encoded)} bytes of description is out of bounds")
        self.layout = Layout(blocks, bucket_count(blocks), len(encoded))
        self.path = directory / (description.replica + SUFFIX)
        self.epoch = time.time_ns()
        self._mask = np.uint64(self.layout.buckets - 1)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
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
            os.close(self._lock)
            draft.unlink(missing_ok=True)
            raise
        this = weakref.ref(self)  # what is registered is never let go
        os.register_at_fork(after_in_child=lambda: _forget_in_child(this))

    def _fill(self, block_size: int, encoded: bytes) -> None:
        layout = self.layout
        HEADER.pack_into(
            self._map, 0, MAGIC, VERSION, PAGE_BYTES, self.epoch, block_size, layout.blocks, layout.buckets, WAYS,
            layout.description_bytes,
        )  # fmt: skip
        self._map[PAGE_BYTES : PAGE_BYTES + len(encoded)] = encoded
        self._words = memoryview(self._map)[:PAGE_BYTES].cast("Q")
        self._states = np.frombuffer(self._map, np.uint64, layout.blocks, layout.states)
        self._keys = np.frombuffer(self._map, np.uint64, 2 * layout.blocks, layout.keys).reshape(-1, 2)
        self._index = np.frombuffer(self._map, np.uint32, WAYS * layout.buckets, layout.index).reshape(-1, WAYS)
        self._states[:] = 1

    def publish(self, blocks: Sequence[int], keys: Keys) -> None:
        """Offer `blocks`, all different, under `keys`, shape (len(blocks), 2): their content is complete until `invalidate`."""
        ids = np.asarray(blocks, np.int64)
        offered = self._states[ids] & _ONE == 0
        if offered.any():
            same = (self._keys[ids] == keys).all(axis=1)
            self.invalidate(ids[offered & ~same].tolist())
            ids, keys = ids[~(offered & same)], keys[~(offered & same)]
        self._keys[ids] = keys
        fence()
        self._states[ids] += _ONE
        self._index_add(ids, keys)
        self._words[VALID_OFFSET // 8] += len(ids)
        self.count("published_blocks", len(ids))

    def invalidate(self, blocks: Sequence[int]) -> int:
        """Withdraw `blocks` before their memory is written again; return how many had been on offer."""
        ids = np.unique(np.asarray(blocks, np.int64))
        ids = ids[self._states[ids] & _ONE == 0]
        if len(ids):
            self._states[ids] += _ONE
            fence()
            buckets = self._keys[ids, 0] & self._mask
            rows = self._index[buckets] == (ids + 1)[:, None]
            found = rows.any(axis=1)
            self._index[buckets[found], rows[found].argmax(axis=1)] = 0
            self._words[VALID_OFFSET // 8] -= len(ids)
        return len(ids)

    def clear(self) -> int:
        """Withdraw every block; return how many had been on offer."""
        return self.invalidate(np.flatnonzero(self._states & _ONE == 0).tolist())

    def _index_add(self, ids: npt.NDArray[np.int64], keys: Keys) -> None:
        """Enter blocks where their bucket has room; if it has none, one block is merely not found any more."""
        buckets = keys[:, 0] & self._mask
        while len(ids):
            _, first = np.unique(buckets, return_index=True)  # one a bucket each time around
            free = self._index[buckets[first]] == 0
            way = np.where(free.any(axis=1), free.argmax(axis=1), ids[first] % WAYS)
            self._index[buckets[first], way] = ids[first] + 1
            ids, buckets = np.delete(ids, first), np.delete(buckets, first)

    def count(self, counter: str, amount: int = 1) -> None:
        """Add `amount` to a counter named in COUNTERS."""
        self._words[COUNTERS_OFFSET // 8 + _COUNTER_INDEX[counter]] += amount

    def beat(self, now_ns: int) -> None:
        """Note the time of a step, CLOCK_MONOTONIC nanoseconds."""
        self._words[HEARTBEAT_OFFSET // 8] = now_ns

    def _forget(self) -> None:
        """In a forked child: close the copy of the descriptor, so that the lock ends with the owner."""
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
        os.close(self._lock)
        self._lock = -1


@dataclass(frozen=True, slots=True)
class Run:
    """The leading blocks of a chain that a table holds: block ids, int32 (n,), and their states, uint64 (n,)."""

    block_ids: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.block_ids)


class TableReader:
    """A read-only view of another process's table. Raises TableError if the file is not a whole table of this user's."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise TableError(f"{path}: {error.strerror}") from error
        try:
            self._open(path)
        except (struct.error, ValueError, OSError, msgspec.MsgspecError) as error:
            os.close(self._fd)
            raise TableError(f"{path}: {error}") from error
        except TableError:
            os.close(self._fd)
            raise

    def _open(self, path: Path) -> None:
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode) or found.st_size < PAGE_BYTES:
            raise TableError(f"{path}: not a table of this user's")
        self.inode = found.st_ino
        self._map = mmap.mmap(self._fd, found.st_size, prot=mmap.PROT_READ)
        magic, version, page, self.epoch, self.block_size, blocks, buckets, ways, length = HEADER.unpack_from(self._map)
        if magic != MAGIC or (version, page, ways) != (VERSION, PAGE_BYTES, WAYS):
            raise TableError(f"{path}: not a block table of version {VERSION}")
        layout = Layout(blocks, buckets, length)
        bounded = 0 < blocks <= BLOCKS_MAX and buckets == bucket_count(blocks) and length <= DESCRIPTION_BYTES_MAX
        if not bounded or self.block_size < 1 or layout.total != found.st_size:
            raise TableError(f"{path}: its sizes do not fit together")
        self.num_blocks: int = blocks
        self.description = msgspec.json.decode(self._map[PAGE_BYTES : PAGE_BYTES + length], type=Description)
        self.name = self.description.replica
        self._words = np.frombuffer(self._map, np.uint64, PAGE_BYTES // 8)
        self._states = np.frombuffer(self._map, np.uint64, blocks, layout.states)
        self._keys = np.frombuffer(self._map, np.uint64, 2 * blocks, layout.keys).reshape(blocks, 2)
        self._index = np.frombuffer(self._map, np.uint32, WAYS * buckets, layout.index).reshape(buckets, WAYS)
        self._mask = np.uint64(buckets - 1)
        self.fingerprint = fingerprint_digest(self.description.fingerprint)

    @property
    def hash_name(self) -> str:
        return self.description.hash_name

    @property
    def transport(self) -> str:
        return self.description.transport

    @property
    def status(self) -> str:
        return self.description.status

    @property
    def fingerprint_fields(self) -> Mapping[str, str]:
        return self.description.fingerprint

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.description.memories

    def alive(self) -> bool:
        """Tell whether the owner still runs, as the kernel knows."""
        return self._fd >= 0 and liveness.claimed(self._fd)

    def longest_run(self, keys: Keys) -> Run:
        """Return the longest run of blocks from the start of `keys`, shape (n, 2), that the table holds at this moment."""
        ids: list[npt.NDArray[np.int32]] = []
        states: list[npt.NDArray[np.uint64]] = []
        for chunk in _chunks(keys):
            found, block_ids, seen = self._look_up(chunk)
            held = len(chunk) if found.all() else int(found.argmin())
            ids.append(block_ids[:held])
            states.append(seen[:held])
            if held < len(chunk):
                break
        if not ids:
            return Run(np.empty(0, np.int32), np.empty(0, np.uint64))
        return Run(np.concatenate(ids), np.concatenate(states))

    def _look_up(self, keys: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
        slots = self._index[keys[:, 0] & self._mask].astype(np.int64) - 1
        possible = (slots >= 0) & (slots < self.num_blocks)
        blocks = np.where(possible, slots, 0)
        before = self._states[blocks]
        fence()
        stored = self._keys[blocks]
        fence()
        after = self._states[blocks]
        same_key = (stored == keys[:, None, :]).all(axis=2)
        match = possible & (before == after) & (before & _ONE == 0) & same_key
        way = match.argmax(axis=1)
        rows = np.arange(len(keys))
        return match[rows, way], blocks[rows, way].astype(np.int32), before[rows, way]

    def unchanged(self, block_ids: npt.NDArray[np.int32], states: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell for each block whether its content stayed what it was when `states` was read. Call it after the copy."""
        fence()
        same: npt.NDArray[np.bool_] = self._states[block_ids] == states
        return same

    def cached_blocks(self) -> int:
        """Return how many blocks the table holds."""
        return int(self._words[VALID_OFFSET // 8])

    def heartbeat_ns(self) -> int:
        """Return the CLOCK_MONOTONIC nanoseconds of the owner's last step, 0 if it has made none."""
        return int(self._words[HEARTBEAT_OFFSET // 8])

    def counters(self) -> dict[str, int]:
        """Return the owner's counters since its epoch began, by the names in COUNTERS."""
        start = COUNTERS_OFFSET // 8
        return dict(zip(COUNTERS, self._words[start : start + len(COUNTERS)].tolist(), strict=True))

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last array that refers to it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _forget_in_child(table: "weakref.ref[TableWriter]") -> None:
    writer = table()
    if writer is not None:
        writer._forget()


def _chunks(keys: Keys) -> Iterator[Keys]:
    start, size = 0, 32
    while start < len(keys):
        yield keys[start : start + size]
        start += size
        size = min(size * 4, _CHUNK_BLOCKS_MAX)


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
