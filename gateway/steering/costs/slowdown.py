"""How much slower or faster than usual a machine is at the moment. Pure.

The fitted terms learn slowly, so that chance does not move them. But other programs on the machine come and go within seconds
and slow down everything at once. So there is one factor on all expected times, learnt from the last few answers and soon
forgotten.
"""

from math import exp, log

SHARE = 0.25
"""Weight of the newest answer."""
SURPRISE_MAX = 0.4
"""Limit on the log error of one answer: a single one that hung says little about the next."""
SLOWDOWN_LOG_MAX = 0.7
"""Bound on the log of the factor: half as fast, twice as fast. Anything beyond is for the terms to learn."""
MEMORY_SECONDS = 15.0
"""Time without an answer after which the log of the factor has faded to 1/e."""


class Slowdown:
    """A running mean of log(measured / expected) that fades to 0. Times are seconds of one clock."""

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
