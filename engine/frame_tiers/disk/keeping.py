"""Which segment of a disk gives way, and which of its frames stay all the same, to be written anew to another.

Pinned frames stay, and, while a tenant has more than its share, those of all tenants that have not. Frames say whose they are
by a mark (transport/table/quality.py).
"""

from collections.abc import Mapping, Sequence, Set

from engine.frame_tiers.disk.segment import HEAD, Place, Segment
from engine.frame_tiers.store import FrameId

MOVED_SHARE_MAX = 0.75
"""A segment more of which would stay is passed over as long as there are others: writing anew takes the disk's time."""


class Keeping:
    """Each tenant may have the share `tenant_share_max` of a disk while others want room, and pins `pin_share_max` of it."""

    def __init__(self, tenant_share_max: float, pin_share_max: float) -> None:
        self._tenant_share_max = tenant_share_max
        self._pin_share_max = pin_share_max
        self._bytes: dict[int, int] = {}
        self._pins: Sequence[Sequence[FrameId]] = ()

    def added(self, place: Place) -> None:
        """A frame is there."""
        self._bytes[place.tenant] = self._bytes.get(place.tenant, 0) + place.size

    def removed(self, place: Place) -> None:
        """A frame is there no more."""
        self._bytes[place.tenant] -= place.size

    def hold(self, pins: Sequence[Sequence[FrameId]]) -> None:
        """These are the pins from now on, in place of all others, each with its frames."""
        self._pins = pins

    def pinned(self, index: Mapping[FrameId, Place], bytes_max: int) -> Set[FrameId]:
        """Return the frames of pins that are there: what is beyond the pins' share does not count."""
        left, found = int(bytes_max * self._pin_share_max), set()
        for pin in self._pins:
            for each in pin:
                place = index.get(each)
                if place is not None and each not in found and place.size <= left:
                    left -= place.size
                    found.add(each)
        return found

    def choose(
        self, segments: Sequence[Segment], index: Mapping[FrameId, Place], bytes_max: int, wanted: tuple[int, int]
    ) -> tuple[Segment, list[FrameId]]:
        """Return which of `segments`, that used longest ago first, gives way, and the frames in it that stay; `wanted` is which
        tenant is to have that room, and how many bytes it is."""
        pinned, limit = self.pinned(index, bytes_max), bytes_max * self._tenant_share_max
        after = {tenant: size for tenant, size in self._bytes.items() if size > 0}
        after[wanted[0]] = after.get(wanted[0], 0) + wanted[1]
        bounded = limit < bytes_max and len(after) > 1
        above = {tenant for tenant, size in after.items() if size > limit} if bounded else set()
        for yielding in (above, set[int]()) if above else (set[int](),):
            if not pinned and not yielding:
                break
            fullest, least = None, 1.0
            for segment in segments:
                moved = staying(segment, index, pinned, yielding)
                part = sum(place.size for each in moved if (place := index.get(each)) is not None) / (segment.size - HEAD.size)
                if part <= MOVED_SHARE_MAX:
                    return segment, moved
                if part < least:
                    fullest, least = (segment, moved), part
            if fullest is not None:
                return fullest
        return segments[0], []


def staying(segment: Segment, index: Mapping[FrameId, Place], pinned: Set[FrameId], above: Set[int]) -> list[FrameId]:
    """Return the frames of a segment that are pinned, or of no tenant of `above` if there is any; pinned ones first."""
    own = [
        (each, place.tenant)
        for each in dict.fromkeys(segment.ids)
        if (place := index.get(each)) is not None and place.segment is segment
    ]
    first = [each for each, _ in own if each in pinned]
    return first + [each for each, tenant in own if above and each not in pinned and tenant not in above]
