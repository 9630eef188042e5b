"""A segment: a file of frames one after the other. Little-endian: magic (8 bytes), created (8, nanoseconds since 1970), frames.

A frame whose magic was replaced by REMOVED is skipped. What follows the first thing that is no frame is not read: the end of a
segment may be torn, as after a power cut. Nothing is appended to the segment of an earlier start.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.frame_tiers.store import FrameId, frame_id, frame_tenant
from transport.frames.errors import FrameError
from transport.frames.frame import HEADER_BYTES, MAGIC, frame_bytes

SUFFIX = ".frames"
REMOVED = b"PKVX"
HEAD = struct.Struct("<8sQ")
_MAGIC = b"PKVSEG\x00\x01"


@dataclass(slots=True, eq=False)
class Segment:
    """`size` bytes are good. `used` orders segments by their last use; `ids` are all that were ever written to it."""

    path: Path
    created_ns: int
    size: int
    used: int = 0
    ids: list[FrameId] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame lies, in bytes, and the mark of the tenant that it is of."""

    segment: Segment
    offset: int
    size: int
    tenant: int = 0


def create(path: Path, created_ns: int) -> tuple[Segment, int]:
    """Return a new segment and a descriptor to append to it. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, HEAD.pack(_MAGIC, created_ns)) != HEAD.size:
            raise OSError(28, "short write")
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return Segment(path, created_ns, HEAD.size), fd


class Found(NamedTuple):
    """A frame in a segment: where it begins and how long it is, in bytes, and the mark of the tenant that it is of."""

    id: FrameId
    offset: int
    size: int
    tenant: int


def scan(path: Path) -> tuple[Segment, list[Found], bool] | None:
    """Return a segment, its frames, and whether it is whole; None if it is no segment. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        total = os.fstat(fd).st_size
        head = os.pread(fd, HEAD.size, 0)
        if len(head) != HEAD.size or not head.startswith(_MAGIC):
            return None
        segment = Segment(path, HEAD.unpack(head)[1], HEAD.size)
        found = []
        for frame, end in _frames(fd, total):
            segment.size = end
            if frame is not None:
                found.append(frame)
                segment.ids.append(frame.id)
        return segment, found, segment.size == total
    finally:
        os.close(fd)


def _frames(fd: int, total: int) -> Iterator[tuple[Found | None, int]]:
    """Yield each frame, None of one that was removed, and where it ends."""
    offset = HEAD.size
    while offset + HEADER_BYTES <= total:
        head = os.pread(fd, HEADER_BYTES, offset)
        removed = head.startswith(REMOVED)
        try:
            size = frame_bytes(MAGIC + head[len(MAGIC) :] if removed else head)
        except FrameError:
            return
        if offset + size > total:
            return
        yield None if removed else Found(frame_id(head), offset, size, frame_tenant(head)), offset + size
        offset += size
