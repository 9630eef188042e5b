"""The prefixes that gateways pinned: their frames do not give way on a disk. Plain code; `now` is CLOCK_MONOTONIC, seconds.

A gateway tells them again when it connects, and until when: so nothing of this outlives the process.
"""

from engine.frame_tiers.messages import Pin
from engine.frame_tiers.models import Models
from engine.frame_tiers.store import FrameId
from transport.groups import needed
from transport.keys import KEY_BYTES, as_keys
from transport.table.group_look_up import GroupChain

PINS_MAX = 4096
BLOCKS_MAX = 1 << 20
"""Keys of all pins together."""


class PinnedPrefixes:
    """Pins by number and fingerprint. `changed` is for whoever has to be told of them anew."""

    def __init__(self) -> None:
        self._pins: dict[tuple[int, bytes], tuple[Pin, float]] = {}
        self._unknown: set[bytes] = set()
        self.changed = False

    def add(self, pin: Pin, now: float) -> None:
        """Keep a pin, in place of an earlier one of its number; one too many is left out."""
        at = (pin.number, pin.fingerprint)
        others = [len(each.keys) for key, (each, _) in self._pins.items() if key != at]
        if len(pin.keys) % KEY_BYTES or len(others) >= PINS_MAX or (sum(others) + len(pin.keys)) // KEY_BYTES > BLOCKS_MAX:
            return
        self._pins[at] = (pin, now + pin.seconds)
        self.changed = True

    def remove(self, number: int) -> None:
        """End a pin."""
        for at in [at for at in self._pins if at[0] == number]:
            del self._pins[at]
            self.changed = True

    def expire(self, now: float) -> None:
        """End the pins whose time is up."""
        for at in [at for at, (_, until) in self._pins.items() if until <= now]:
            del self._pins[at]
            self.changed = True

    def clear(self) -> None:
        """End all."""
        self.changed |= bool(self._pins)
        self._pins.clear()

    def due(self, models: Models) -> bool:
        """Whether `frames` would say something else than it said last."""
        return self.changed or any(models.find(each) is not None for each in self._unknown)

    def frames(self, models: Models) -> list[list[FrameId]]:
        """Return the frames of each pin, but for those of models that are not known yet."""
        self.changed = False
        self._unknown.clear()
        found = []
        for pin, _ in self._pins.values():
            model = models.find(pin.fingerprint)
            if model is None:
                self._unknown.add(pin.fingerprint)
                continue
            chain = GroupChain(model.groups, as_keys(pin.keys))
            ids: list[FrameId] = []
            for number, group in enumerate(model.groups):
                blocks = needed(group, 0, chain.tokens)
                ids += model.all_ids(chain.keys(number)[blocks.start : blocks.stop])
            found.append(ids)
        return found
