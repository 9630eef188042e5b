"""Which blocks pins hold in a tier, for a bounded time. Plain code without a clock: `now_ns` is CLOCK_MONOTONIC."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transport.hint import PinWish

PINS_MAX = 4096
_NEVER = 1 << 63


@dataclass(frozen=True, slots=True)
class _Pin:
    keys: tuple[bytes, ...]
    until_ns: int


class TierPins:
    """Pins by their numbers: at most `blocks_max` different blocks and PINS_MAX pins."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._pins: dict[int, _Pin] = {}
        self._held: dict[bytes, int] = {}
        self._next_ns = _NEVER

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def take(self, wish: PinWish, keys: Iterable[bytes], now_ns: int) -> tuple[list[bytes], list[bytes]] | None:
        """Pin blocks in place of what has the same number; return those held by now that were not, and those held no more.

        None, and nothing changes, if there are none or they do not fit.
        """
        former, wanted = self._pins.get(wish.id), dict.fromkeys(keys)
        added = [key for key in wanted if key not in self._held]
        full = former is None and len(self._pins) >= PINS_MAX
        if not wanted or full or len(self._held) + len(added) > self._blocks_max:
            return None
        for key in wanted:
            self._held[key] = self._held.get(key, 0) + 1
        until_ns = now_ns + int(wish.seconds * 1e9)
        self._pins[wish.id] = _Pin(tuple(wanted), until_ns)
        self._next_ns = min(self._next_ns, until_ns)
        return added, self._let_go([former]) if former is not None else []

    def drop(self, ids: Sequence[int]) -> list[bytes]:
        """Unpin by number, unknown ones aside; return what no pin holds any more."""
        return self._let_go([self._pins.pop(each) for each in ids if each in self._pins])

    def expire(self, now_ns: int) -> list[bytes]:
        """Unpin everything whose time is up; return what no pin holds any more."""
        if now_ns < self._next_ns:
            return []
        freed = self.drop([each for each, pin in self._pins.items() if pin.until_ns <= now_ns])
        self._next_ns = min((pin.until_ns for pin in self._pins.values()), default=_NEVER)
        return freed

    def clear(self) -> None:
        """Unpin everything."""
        self._pins.clear()
        self._held.clear()
        self._next_ns = _NEVER

    def _let_go(self, pins: Sequence[_Pin]) -> list[bytes]:
        freed = []
        for pin in pins:
            for key in pin.keys:
                self._held[key] -= 1
                if not self._held[key]:
                    del self._held[key]
                    freed.append(key)
        return freed
