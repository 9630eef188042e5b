"""Which outcomes to learn from when they arrive faster than is useful. Pure."""

RATE_MAX = 200.0
"""Outcomes per second of one model. The terms remember some 400 and the slowdown those of seconds: more add nothing."""
BURST_SECONDS = 1.0
"""Unused rate of this many seconds may be used at once: below the rate nothing is left out."""


class Sampling:
    """Takes all outcomes up to RATE_MAX, and an evenly spread part of faster ones; times are seconds of one clock."""

    __slots__ = ("_due", "_latest")

    def __init__(self) -> None:
        self._due = 0.0  # when the next one is due, had they come one by one
        self._latest = 0.0  # slow ones are reported late, and must not be left out because of that

    def takes(self, now: float) -> bool:
        """Tell whether to learn from an outcome at `now`."""
        if now > self._latest:
            self._latest = now
        if self._due > self._latest:
            return False
        self._due = max(self._due, self._latest - BURST_SECONDS) + 1 / RATE_MAX
        return True
