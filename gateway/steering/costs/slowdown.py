"""How much slower or faster than usual a machine is just now. Pure.

The fitted terms learn slowly, so that chance does not move them. But what shares a machine comes and goes within seconds, and
slows down everything at once: one factor for all that is expected, learnt from the last few answers and soon forgotten.
"""

from math import exp, log

SHARE = 0.25
"""Weight of the newest answer."""
SURPRISE_MAX = 0.4
"""An answer is not believed to be further off than this, in log: a single one that hung says little of the next."""
SLOWDOWN_LOG_MAX = 0.7
"""Bound on the log of the factor: half as fast, twice as fast. What goes further is for the terms to learn."""
MEMORY_SECONDS = 15.0
"""The log of the factor has faded to 1/e after so long without an answer."""


class Slowdown:
    """A running mean of the log of measured / expected that fades to that of 1. Times are seconds of one clock."""

    __slots__ = ("_at", "_log")

    def __init__(self) -> None:
        self._log = 0.0
        self._at = 0.0

    @property
    def last(self) -> float:
        """The factor right after the last answer."""
        return exp(self._log)

    def factor(self, now: float) -> float:
        """What to multiply expected times with."""
        return exp(self._faded(now))

    def heard(self, ratio: float, now: float) -> None:
        """An answer took `ratio` times, above 0, what the terms say."""
        faded = self._faded(now)
        surprise = min(max(log(ratio) - faded, -SURPRISE_MAX), SURPRISE_MAX)
        self._log = min(max(faded + SHARE * surprise, -SLOWDOWN_LOG_MAX), SLOWDOWN_LOG_MAX)
        self._at = max(self._at, now)

    def _faded(self, now: float) -> float:
        past = now - self._at
        return self._log * exp(-past / MEMORY_SECONDS) if past > 0 else self._log
