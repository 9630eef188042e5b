"""What was used up in the last minute, second by second. Pure."""

from __future__ import annotations

import msgspec

WINDOW_SECONDS = 60


class MinuteWindow(msgspec.Struct):
    """Amounts by the second, Unix time, in which they were added; none ever counts for less than WINDOW_SECONDS.

    A second leaves as a whole, once its end is so long ago: so a limit on `total` holds in any WINDOW_SECONDS. Call `roll`
    before looking at the rest.
    """

    slots: dict[int, int] = {}
    total: int = 0
    newest: int = 0

    def roll(self, now: float) -> None:
        """Drop the seconds that are over. After a clock that was set back, what lies ahead counts from now."""
        second, slots = int(now), self.slots
        if second < self.newest:
            ahead = sum(slots.pop(each) for each in [each for each in slots if each > second])
            self.newest = second
            if ahead:
                slots[second] = slots.get(second, 0) + ahead
        while slots:
            oldest = next(iter(slots))
            if oldest >= second - WINDOW_SECONDS:
                break
            self.total -= slots.pop(oldest)

    def add(self, amount: int, now: float) -> int:
        """Count an amount; returns the second that it is counted in. Call `roll` with the same `now` before."""
        second = self.newest = int(now)
        self.slots[second] = self.slots.get(second, 0) + amount
        self.total += amount
        return second

    def take_back(self, second: int, amount: int) -> None:
        """An amount that was counted in that second was not used after all. Nothing happens if the second is over."""
        found = self.slots.get(second, 0)
        amount = min(amount, found)
        if amount:
            self.slots[second] = found - amount
            self.total -= amount

    def frees(self, needed: int, now: float) -> float:
        """Seconds until `needed` of the total will have left, or all of it if that is less."""
        seconds = 0.0
        for second, amount in self.slots.items():
            if needed <= 0:
                break
            if amount:
                needed -= amount
                seconds = second + WINDOW_SECONDS + 1 - now
        return seconds

    def empties(self, now: float) -> float:
        """Seconds until nothing is left."""
        return self.newest + WINDOW_SECONDS + 1 - now if self.total else 0.0
