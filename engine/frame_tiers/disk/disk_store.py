"""The disk as a store of frames. The segment that was used longest ago gives way; a failing disk is only read for a while.

So is a full one. If it still is full after that, the budget is for an hour what was there then, and segments give way.

One process at a time writes a directory: the kernel drops its lock when it ends, however it ends.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from engine.frame_tiers.disk.directory import claim, write_all
from engine.frame_tiers.disk.keeping import Keeping, staying
from engine.frame_tiers.disk.reading import read_stretch, stretches
from engine.frame_tiers.disk.segment import HEAD, REMOVED, SUFFIX, Place, Segment, create, scan
from engine.frame_tiers.store import FrameId, StoreName, StoreStats, Take, frame_tenant

_logger = logging.getLogger("peerkv.disk")

SEGMENT_BYTES_MIN, SEGMENT_BYTES_MAX = 64 << 20, 256 << 20
SEGMENTS_AIMED = 64
"""A budget is cut into about so many segments, within those bounds; one too small for that into four."""
READERS = 4
READ_ONLY_SECONDS = 60.0
"""After a failed write the disk is only read for so long; then a write is tried again."""
FULL_SECONDS = 3600.0
"""A disk that stays full sets the budget for so long; then the configured one is tried again."""
SYNC_BYTES = 32 << 20
LOCK_SECONDS_MAX = 5.0
WRITES_TOGETHER = 256
TTL_PARTS = 8
"""A segment is closed when it is this part of the TTL old: so frames live for seven eighths of it at least."""


@dataclass(slots=True)
class _Open:
    """The segment that is appended to."""

    segment: Segment
    fd: int
    unsynced: int = 0


class DiskStore:
    """Frames under `directory`, at most `bytes_max` of them, each for at most `ttl_seconds` (0: without end).

    A tenant has the share `tenant_share_max` at most while others want room, and pins `pin_share_max` (keeping.py).

    Raises StoreRefused if the directory cannot be used, or another process writes it.
    """

    name: StoreName = "disk"

    def __init__(
        self,
        directory: Path,
        bytes_max: int,
        *,
        ttl_seconds: float = 0.0,
        tenant_share_max: float = 1.0,
        pin_share_max: float = 0.0,
        segment_bytes: int = 0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        writev: Callable[[int, list[bytes]], int] = os.writev,
        lock_seconds: float = LOCK_SECONDS_MAX,
    ) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._ttl_seconds = ttl_seconds
        self._segment_bytes = segment_bytes or _segment_bytes(bytes_max)
        self._clock = clock  # of the frames' age, which is told to later starts
        self._monotonic = monotonic
        self._writev = writev
        self._writing = threading.Lock()  # of what changes files, which takes as long as the disk does
        self._lock = threading.Lock()  # of the index, the segments and the figures: nobody waits for the disk with it
        self._index: dict[FrameId, Place] = {}
        self._segments: list[Segment] = []
        self._keeping = Keeping(tenant_share_max, pin_share_max)
        self._moving: list[tuple[FrameId, bytes]] = []  # what stays of segments that gave way
        self._open: _Open | None = None
        self._turn = 0
        self._number = 0
        self._read_only_until = -inf
        self._why = ""
        self._was_full = False
        self._fits = (self._bytes_max, self._segment_bytes)
        self._fits_until = -inf
        self._stats = StoreStats("disk", bytes_max=bytes_max)
        self._lock_fd = claim(directory, lock_seconds)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="peerkv-disk")
        self._load()

    # What is there

    def stats(self) -> StoreStats:
        with self._lock:
            state = f"read-only: {self._why}" if self._why else "ok"
            return replace(self._stats, state=state, frames=len(self._index), bytes=self._size())

    def ready(self) -> bool:
        return self._monotonic() >= self._read_only_until

    def holds(self, ids: Sequence[FrameId], deadline: float) -> list[bool]:
        with self._lock:
            return [each in self._index for each in ids]

    def knows(self, each: FrameId) -> bool:
        return each in self._index

    def fetch(self, ids: Sequence[FrameId], take: Take, deadline: float) -> None:
        began = time.monotonic()
        with self._lock:
            found = [(place, number) for number, each in enumerate(ids) if (place := self._index.get(each)) is not None]
            self._turn += 1
            for place, _ in found:
                place.segment.used = self._turn
            self._stats.missed_frames += len(ids) - len(found)
        jobs = []
        for segment in dict.fromkeys(place.segment for place, _ in found):
            own = sorted(((p, n) for p, n in found if p.segment is segment), key=lambda each: each[0].offset)
            for first, last in stretches([(place.offset, place.size) for place, _ in own]):
                jobs.append(self._readers.submit(self._read, own[first:last], ids, take, deadline))
        wait(jobs)
        for job in jobs:
            job.result()
        if found:
            with self._lock:
                self._stats.read_seconds += time.monotonic() - began

    def _read(self, own: list[tuple[Place, int]], ids: Sequence[FrameId], take: Take, deadline: float) -> None:
        """Read frames that lie side by side."""
        good: list[int] = []
        bad: list[FrameId] = []

        def taken(at: int, frame: memoryview) -> None:
            place, number = own[at]
            if take(number, frame):
                good.append(place.size)
            else:
                bad.append(ids[number])

        failed = False
        if time.monotonic() < deadline:
            try:
                read_stretch(own[0][0].segment.path, [(place.offset, place.size) for place, _ in own], taken)
            except OSError as error:  # gone, or not to be read: its frames are missed, and are not asked for again
                failed = True
                bad += [ids[number] for _, number in own]
                _logger.warning("a segment is not read: %s", error)
        self._forget(bad)
        with self._lock:
            self._stats.found_frames += len(good)
            self._stats.found_bytes += sum(good)
            self._stats.errors += failed
            self._stats.damaged_frames += 0 if failed else len(bad)
            self._stats.missed_frames += len(own) - len(good) - (0 if failed else len(bad))

    # What changes it

    def put(self, frames: Sequence[tuple[FrameId, bytes]]) -> None:
        with self._writing:
            self._put(frames)

    def _put(self, frames: Sequence[tuple[FrameId, bytes]]) -> None:
        fresh = {each: frame for each, frame in frames if each not in self._index}
        if not self.ready():
            self._stats.dropped_frames += len(fresh)
            return
        self._why = ""
        segment_bytes = self._limits()[1]
        batch: list[tuple[FrameId, bytes]] = []
        size = 0
        for each, frame in fresh.items():
            if HEAD.size + len(frame) > segment_bytes:
                self._stats.dropped_frames += 1
                continue
            if not self._fits_in(size + len(frame)):
                self._write(batch)
                batch, size = [], 0
                if not self._begin_with(len(frame), frame_tenant(frame)):
                    self._stats.dropped_frames += 1
                    continue
            batch.append((each, frame))
            size += len(frame)
            if len(batch) == WRITES_TOGETHER:
                self._write(batch)
                batch, size = [], 0
        self._write(batch)

    def _fits_in(self, size: int) -> bool:
        """Whether the open segment takes so many bytes more."""
        return self._open is not None and self._open.segment.size + size <= self._limits()[1]

    def _begin_with(self, size: int, tenant: int) -> bool:
        """Begin segments until one takes so many bytes beside what is written anew to it; False if that fails. They are this
        tenant's, as far as is known."""
        for _ in range(len(self._segments) + 1):
            if not self._begin(tenant):
                return False
            if self._fits_in(size):
                return True
        return False

    def _write(self, batch: list[tuple[FrameId, bytes]]) -> None:
        """Append frames to the open segment."""
        if not batch:
            return
        if self._open is None:
            self._stats.dropped_frames += len(batch)
            return
        own, sizes = self._open, [len(frame) for _, frame in batch]
        try:
            write_all(self._writev, own.fd, [frame for _, frame in batch])
        except OSError as error:
            self._cut(own)
            self._not_written(error, max(sizes))
            self._stats.dropped_frames += len(batch)
            return
        self._was_full = False
        with self._lock:
            for (each, frame), size in zip(batch, sizes, strict=True):
                self._index[each] = place = Place(own.segment, own.segment.size, size, frame_tenant(frame))
                self._keeping.added(place)
                own.segment.ids.append(each)
                own.segment.size += size
        own.unsynced += sum(sizes)
        self._stats.stored_frames += len(batch)
        self._stats.stored_bytes += sum(sizes)
        if own.unsynced >= SYNC_BYTES:
            self._sync(own)

    def _begin(self, tenant: int) -> bool:
        """Close the open segment and begin another, for which there is room; False if that fails."""
        self._seal()
        moving: list[tuple[FrameId, bytes]] = []
        self._moving = moving
        if not self.ready() or not self._make_room(self._limits()[1], tenant):
            return False
        self._number += 1
        try:
            segment, fd = create(self._directory / f"{self._number:010}{SUFFIX}", int(self._clock() * 1e9))
        except OSError as error:
            self._not_written(error, 0)
            return False
        with self._lock:
            self._turn += 1
            segment.used = self._turn
            self._segments.append(segment)
        self._open = _Open(segment, fd)
        for first in range(0, len(moving), WRITES_TOGETHER):
            self._rewrite(self._write, moving[first : first + WRITES_TOGETHER])
        return self._open is not None

    def _rewrite(self, write: Callable[[list[tuple[FrameId, bytes]]], None], moving: list[tuple[FrameId, bytes]]) -> None:
        """Write frames that were there before: that stores nothing new."""
        before = self._stats.stored_frames, self._stats.stored_bytes
        write(moving)
        self._stats.moved_frames += self._stats.stored_frames - before[0]
        self._stats.stored_frames, self._stats.stored_bytes = before

    def _make_room(self, size: int, tenant: int | None = None) -> bool:
        """Remove segments until `size` more bytes are within the budget: those used longest ago first.

        If they are for a `tenant`, what stays of what is removed (keeping.py) is read, to be written anew.
        """
        bytes_max = self._limits()[0]
        while self._size() + size > bytes_max and self._segments:
            own = self._open.segment if self._open is not None else None
            others = [segment for segment in self._segments if segment is not own]
            going, stays = min(others or self._segments, key=lambda segment: segment.used), list[FrameId]()
            if tenant is not None and others:
                in_order = sorted(others, key=lambda segment: segment.used)
                going, stays = self._keeping.choose(in_order, self._index, bytes_max, (tenant, size))
            if going is own:
                self._seal()
            moved = self._read_whole(going, stays)
            if self._unlink(going):  # it still can be read
                return False
            self._stats.evicted_frames += self._leave_out(going) - len(moved)
            self._moving += moved
        return self._size() + size <= bytes_max

    def _read_whole(self, segment: Segment, ids: Sequence[FrameId]) -> list[tuple[FrameId, bytes]]:
        """Return frames of a segment that are to be written anew, as many as fit into one; none if it cannot be read."""
        found: list[tuple[FrameId, bytes]] = []
        left = self._limits()[1] - HEAD.size - sum(len(frame) for _, frame in self._moving)
        places = [(each, place) for each in ids if (place := self._index.get(each)) is not None]
        try:
            with segment.path.open("rb") as file:
                for each, place in places:
                    if place.size <= left:
                        left -= place.size
                        file.seek(place.offset)
                        found.append((each, file.read(place.size)))
        except OSError as error:
            _logger.warning("what should stay of a segment is lost: %s", error)
        return found

    def _limits(self) -> tuple[int, int]:
        """Return the budget and the size of a segment, in bytes: of a disk that stays full, what fits."""
        return self._fits if self._monotonic() < self._fits_until else (self._bytes_max, self._segment_bytes)

    def _leave_out(self, segment: Segment) -> int:
        """Forget a segment; return how many frames went with it."""
        with self._lock:
            self._segments.remove(segment)
            lost = {each for each in segment.ids if (place := self._index.get(each)) is not None and place.segment is segment}
            for each in lost:
                self._keeping.removed(self._index.pop(each))
            return len(lost)

    def _unlink(self, segment: Segment) -> str:
        """Remove a segment's file; return why that failed, "" if it did not."""
        try:
            segment.path.unlink(missing_ok=True)
        except OSError as error:
            self._failed(error)
            return f"{segment.path}: {error.strerror}"
        return ""

    def remove(self, ids: Sequence[FrameId]) -> None:
        self._forget(ids)

    def _forget(self, ids: Sequence[FrameId]) -> None:
        """Forget frames, also beyond a restart as far as the disk lets us."""
        with self._lock:
            places = [place for each in ids if (place := self._index.pop(each, None)) is not None]
            for place in places:
                self._keeping.removed(place)
        for place in places:
            try:
                fd = os.open(place.segment.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.pwrite(fd, REMOVED, place.offset)
                finally:
                    os.close(fd)
            except OSError as error:  # it is forgotten until the next start, and is checked whenever it is read
                _logger.info("a frame is not marked as removed: %s", error)

    def flush(self) -> str:
        with self._writing:
            self._seal()
            why = ""
            for segment in list(self._segments):
                self._leave_out(segment)
                why = self._unlink(segment) or why
            return why

    def hold(self, pins: Sequence[Sequence[FrameId]]) -> None:
        self._keeping.hold(pins)

    def tend(self) -> None:
        with self._writing:
            if self._ttl_seconds:
                self._expire(int(self._clock() * 1e9), int(self._ttl_seconds * 1e9))
            if self._open is not None and self._open.unsynced:
                self._sync(self._open)

    def _expire(self, now_ns: int, ttl_ns: int) -> None:
        """Remove what is too old; what is pinned of it is written anew."""
        if self._open is not None and now_ns - self._open.segment.created_ns > ttl_ns // TTL_PARTS:
            self._seal()
        expired = [each for each in self._segments if now_ns - each.created_ns >= ttl_ns]
        if not expired:
            return
        pinned = self._keeping.pinned(self._index, self._limits()[0])
        for segment in expired:
            if segment not in self._segments:
                continue  # it gave way to what was written anew
            self._moving = []
            moved = self._read_whole(segment, staying(segment, self._index, pinned, set()))
            self._stats.expired_frames += self._leave_out(segment) - len(moved)
            self._unlink(segment)
            if moved:
                self._rewrite(self._put, moved)

    def close(self) -> None:
        self._readers.shutdown()
        with self._writing:
            self._seal()
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    # Inside

    def _size(self) -> int:
        return sum(segment.size for segment in self._segments)

    def _seal(self) -> None:
        own, self._open = self._open, None
        if own is not None:
            self._sync(own)
            os.close(own.fd)

    def _sync(self, own: _Open) -> None:
        own.unsynced = 0
        try:
            os.fdatasync(own.fd)
            os.posix_fadvise(own.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            self._failed(error)

    def _cut(self, own: _Open) -> None:
        """After a failed write: nothing is appended to this segment any more, and what is torn is cut off."""
        try:
            os.ftruncate(own.fd, own.segment.size)
        except OSError as error:
            _logger.info("the torn end of %s stays: %s", own.segment.path, error)
        self._open = None
        os.close(own.fd)
        if own.segment.size == HEAD.size:
            self._leave_out(own.segment)
            self._unlink(own.segment)

    def _not_written(self, error: OSError, frame_bytes: int) -> None:
        """A write failed. Only read for a while; if the disk was full already before, make do with what is there."""
        if not (_full(error) and self._was_full and self._segments):
            self._failed(error)
            return
        self._was_full = False
        with self._lock:
            self._stats.errors += 1
        fits = self._size()
        own = min(self._segment_bytes, max(HEAD.size + frame_bytes, _segment_bytes(fits)))
        self._fits, self._fits_until = (fits, own), self._monotonic() + FULL_SECONDS
        _logger.warning("%s is still full: older blocks give way to newer ones within %d bytes", self._directory, fits)
        self._make_room(own)

    def _failed(self, error: OSError) -> None:
        self._was_full = _full(error)
        self._why = f"{self._directory} is full" if self._was_full else f"{self._directory}: {error.strerror}"
        with self._lock:
            self._stats.errors += 1
        self._read_only_until = self._monotonic() + READ_ONLY_SECONDS
        _logger.warning("the disk is only read for %g s: %s", READ_ONLY_SECONDS, self._why)

    def _load(self) -> None:
        """Read what earlier starts left, oldest first."""
        for path in sorted(self._directory.glob("[0-9]" * 10 + SUFFIX)):  # as we name them: anything else is somebody else's
            self._number = max(self._number, int(path.stem))
            try:
                found = scan(path)
                if found is None or not found[2]:
                    self._stats.errors += 1
                    what = "is no segment: it is removed" if found is None else "has something torn, which ends it"
                    _logger.warning("%s %s", path, what)
                if found is None or not found[0].ids:
                    path.unlink(missing_ok=True)
                    continue
                segment, frames, whole = found
                if not whole:
                    segment.size = path.stat().st_size
            except OSError as error:
                self._stats.errors += 1
                _logger.warning("%s is left out: %s", path, error)
                continue
            self._turn += 1
            segment.used = self._turn
            self._segments.append(segment)
            for each in frames:
                if (older := self._index.get(each.id)) is not None:
                    self._keeping.removed(older)
                self._index[each.id] = place = Place(segment, each.offset, each.size, each.tenant)
                self._keeping.added(place)
        self._make_room(0)
        self._stats.evicted_frames = 0
        _logger.info("%s holds %d frames in %d segments", self._directory, len(self._index), len(self._segments))


def _full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _segment_bytes(bytes_max: int) -> int:
    if bytes_max < 4 * SEGMENT_BYTES_MIN:
        return max(1, bytes_max // 4)
    return min(SEGMENT_BYTES_MAX, max(SEGMENT_BYTES_MIN, bytes_max // SEGMENTS_AIMED))
