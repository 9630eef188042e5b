"""Which outcomes to learn from when they come faster than there is anything to learn. Pure."""

RATE_MAX = 200.0
"""Outcomes a second of one model. The terms remember some 400 of them and the slowdown those of seconds: more say the same."""
BURST_SECONDS = 1.0
"""What was not used of the rate for so long may come at once: below the rate nothing is left out."""


class Sampling:
    """Takes all while they come at RATE_MAX or less, and some, evenly spread, of what comes faster; in seconds of one clock."""

    __slots__ = ("_due", "_latest")

    def __init__(self) -> None:
        self._due = 0.0  # when the next is, had they come one by one
        self._latest = 0.0  # those that took long are heard of late, and must not be left out for that

    def takes(self, now: float) -> bool:
        """Tell whether to learn from one that came at `now`."""
        if now > self._latest:
            self._latest = now
        if self._due > self._latest:
            return False
        self._due = max(self._due, self._latest - BURST_SECONDS) + 1 / RATE_MAX
        return True
