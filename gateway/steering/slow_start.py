"""Replicas that were just restarted get few requests at first: their caches are empty, and nothing in them is warm. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

SHARE_MIN = 0.1
"""Of the requests that another replica has, at the start."""


class SlowStart:
    """For `seconds` after its restart, 0: none, a replica has a growing share of the requests that the others have each.

    One request at a time it always gets. Times are seconds of one clock. Belongs to one thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began: dict[str, float] = {}

    def began(self, name: str, now: float) -> None:
        """A replica that was restarted serves from now on."""
        if self.seconds:
            self._began[name] = now

    def takers(self, names: Collection[str], now: float, in_flight: Callable[[], Mapping[str, int]]) -> Collection[str]:
        """Those of `names` that get requests: all of them if otherwise none would. The same object if nobody starts slowly."""
        if not self._began:
            return names
        self._began = {name: began for name, began in self._began.items() if now - began < self.seconds}
        settled = [name for name in names if name not in self._began]
        if not self._began or not settled:
            return names
        counts = in_flight()
        each = sum([counts.get(name, 0) for name in settled]) / len(settled)
        return [name for name in names if counts.get(name, 0) < self._allowed(name, each, now)]

    def _allowed(self, name: str, each: float, now: float) -> float:
        """How many requests it may have at once, where each of the others has `each`."""
        began = self._began.get(name)
        if began is None:
            return float("inf")
        return max(1.0, each * max(SHARE_MIN, (now - began) / self.seconds))
