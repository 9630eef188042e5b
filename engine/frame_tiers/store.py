"""The seam between frames and where they are kept. A store is a cache: it may lose anything, and never waits for long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from transport.frames.frame import HEADER_BYTES

StoreName = Literal["disk", "vault"]
FrameId = bytes
"""What a frame is found by: its fingerprint and its key, 32 bytes, as its header has them."""
ID_BYTES = 32
_ID = slice(8, 8 + ID_BYTES)
_TENANT = slice(42, 44)

Take = Callable[[int, memoryview], bool]
"""Is given the place of an id among those asked for, and its frame, which is gone when it returns; False if that is no good.

It is called in threads of the store, several at once.
"""


class StoreRefused(Exception):
    """The store cannot be used; the message says why, and what to do."""


@dataclass(slots=True)
class StoreStats:
    """A disk or a vault since the process that keeps it began. Frames are blocks, one a rank; sizes are in bytes."""

    name: Annotated[StoreName, Field(description="which store")]
    state: Annotated[str, Field(description='"ok", or why it takes or gives nothing now')] = "ok"
    frames: Annotated[int, Field(description="frames there now; of a vault as of seconds ago, other nodes' included")] = 0
    bytes: Annotated[int, Field(description="what they take")] = 0
    bytes_max: Annotated[int, Field(description="what they may take; 0: not known")] = 0
    stored_frames: Annotated[int, Field(description="frames written")] = 0
    stored_bytes: Annotated[int, Field(description="bytes written")] = 0
    dropped_frames: Annotated[int, Field(description="frames not written: it was full, gone, or too slow")] = 0
    evicted_frames: Annotated[int, Field(description="frames that gave way to others")] = 0
    expired_frames: Annotated[int, Field(description="frames that became too old")] = 0
    found_frames: Annotated[int, Field(description="frames read and good")] = 0
    found_bytes: Annotated[int, Field(description="bytes read and good")] = 0
    missed_frames: Annotated[int, Field(description="frames asked for and not there")] = 0
    moved_frames: Annotated[
        int, Field(description="frames written anew, as they are pinned or another tenant has more than its share")
    ] = 0
    damaged_frames: Annotated[int, Field(description="frames that were not what they should be; they are forgotten")] = 0
    errors: Annotated[int, Field(description="failed operations")] = 0
    read_seconds: Annotated[float, Field(description="time of the reads that found something")] = 0.0


class FrameStore(Protocol):
    """Any thread may call it; `put` is called by one at a time."""

    @property
    def name(self) -> StoreName: ...

    def stats(self) -> StoreStats:
        """Return a copy of its figures, at once."""

    def ready(self) -> bool:
        """Whether it takes frames now."""

    def holds(self, ids: Sequence[FrameId], deadline: float) -> list[bool]:
        """Tell for each id whether it is there; False in any doubt. `deadline` is CLOCK_MONOTONIC, as everywhere here."""

    def knows(self, each: FrameId) -> bool:
        """Whether a frame is known to be there, without asking anybody."""

    def put(self, frames: Sequence[tuple[FrameId, bytes]]) -> None:
        """Keep frames, those that are there already aside. What cannot be kept is counted."""

    def fetch(self, ids: Sequence[FrameId], take: Take, deadline: float) -> None:
        """Call `take` for each frame that is there, and return when none is being taken any more.

        Forgets those for which it returned False. What is not read by the deadline is missed.
        """

    def remove(self, ids: Sequence[FrameId]) -> None:
        """Forget these."""

    def hold(self, pins: Sequence[Sequence[FrameId]]) -> None:
        """The frames of these pins are to give way to no others, in place of those that it was told before."""

    def flush(self) -> str:
        """Forget everything; return why that failed, "" if it did not."""

    def tend(self) -> None:
        """Do what is due: called about once a second by whoever puts."""

    def close(self) -> None:
        """Write what is not written, let go of everything."""


def frame_id(frame: bytes | memoryview) -> FrameId:
    """Return the id of a frame, or of its first HEADER_BYTES bytes, which are not checked here."""
    assert len(frame) >= HEADER_BYTES
    return bytes(frame[_ID])


def frame_tenant(frame: bytes | memoryview) -> int:
    """Return the mark of the tenant that a frame is of, given at least its first HEADER_BYTES bytes, which are not checked."""
    return int.from_bytes(frame[_TENANT], "little")
