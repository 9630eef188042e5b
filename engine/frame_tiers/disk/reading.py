"""Reads stretches of files, past the page cache where the file system allows that: what is restored is not read again soon."""

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

ALIGN = 4096
READ_BYTES_MAX = 4 << 20
"""Frames side by side are read together up to so many bytes: larger reads are no faster."""

_buffers = threading.local()


def read_stretch(path: Path, places: Sequence[tuple[int, int]], take: Callable[[int, memoryview], None]) -> None:
    """Read `places`, (offset, bytes) in ascending order, in one go, and call `take` with the number of each and its bytes.

    Places beyond the end of the file are left out. Raises OSError.
    """
    begin = places[0][0] // ALIGN * ALIGN
    end = -(-(places[-1][0] + places[-1][1]) // ALIGN) * ALIGN
    buffer = _buffer(end - begin)
    got = _read(path, buffer[: end - begin], begin)
    for number, (offset, size) in enumerate(places):
        if offset - begin + size <= got:
            take(number, buffer[offset - begin : offset - begin + size])


def stretches(places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut places in ascending order into those that are read together: (first, behind the last)."""
    cuts, begin = [], 0
    for number in range(1, len(places) + 1):
        if number < len(places):
            offset, size = places[number]
            before = sum(places[number - 1])
            if offset - before < ALIGN and offset + size - places[begin][0] <= READ_BYTES_MAX:
                continue
        cuts.append((begin, number))
        begin = number
    return cuts


def _read(path: Path, buffer: memoryview, offset: int) -> int:
    """Read past the page cache, or through it where the file system cannot do that; return how many bytes there were."""
    for flags in (os.O_DIRECT, 0):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flags)
            try:
                return _fill(fd, buffer, offset)
            finally:
                os.close(fd)
        except OSError as error:
            if not flags or error.errno != errno.EINVAL:
                raise
    raise AssertionError("unreachable")


def _fill(fd: int, buffer: memoryview, offset: int) -> int:
    """Read until the buffer is full or the file ends; return how many bytes that were."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        done += got
        if not got or got % ALIGN:  # the end of the file: what follows would not be aligned
            break
    return done


def _buffer(size: int) -> memoryview:
    """Return this thread's own aligned buffer, at least `size` bytes long."""
    known: memoryview | None = getattr(_buffers, "view", None)
    if known is None or len(known) < size:
        known = _buffers.view = memoryview(mmap.mmap(-1, max(size, READ_BYTES_MAX + 2 * ALIGN)))
    return known
