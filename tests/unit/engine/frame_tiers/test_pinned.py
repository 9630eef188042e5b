"""Which pins a tier keeps."""

from engine.frame_tiers import pinned
from engine.frame_tiers.messages import Pin
from engine.frame_tiers.pinned import PinnedPrefixes
from transport.keys import KEY_BYTES

FINGERPRINT = bytes(16)


def told(pins: PinnedPrefixes, number: int, now: float) -> bool:
    """Whether a pin of two blocks for 10 s is taken."""
    pins.changed = False
    pins.add(Pin(number, FINGERPRINT, bytes(2 * KEY_BYTES), 10.0), now)
    return pins.changed


def test_a_pin_is_renewed_also_where_there_is_no_room_for_another(monkeypatch):
    monkeypatch.setattr(pinned, "BLOCKS_MAX", 4)
    pins = PinnedPrefixes()
    assert [told(pins, number, 0.0) for number in range(3)] == [True, True, False]
    assert told(pins, 0, 9.0)
    pins.expire(11.0)
    assert told(pins, 2, 11.0)  # in the room of number 1, which was not renewed
    assert not told(pins, 1, 11.0)
