"""The highest rate at which a percentile of times stays within a bound: a ladder of rates, up or down. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Sure = Literal["between", "at least", "at most"]


@dataclass(frozen=True, slots=True)
class Found:
    """`rate` lies between two that were tried; or all that were tried were within the bound, or none was."""

    rate: float
    sure: Sure


@dataclass(slots=True)
class RateSearch:
    """Begins at `first` and multiplies by `growth`, or divides if `first` is too much, for at most `steps_max` rates.

    Rates are requests per second, `bound` and times are seconds.
    """

    first: float
    growth: float
    bound: float
    steps_max: int
    tried: dict[float, float] = field(default_factory=dict)

    def next_rate(self) -> float | None:
        """Return the rate to try now, None if the search is over."""
        if not self.tried:
            return self.first
        within, beyond = self._sides()
        if (within and beyond) or len(self.tried) >= self.steps_max:
            return None
        return within[-1] * self.growth if within else beyond[0] / self.growth

    def note(self, rate: float, seconds: float) -> None:
        """At this rate the percentile was so long."""
        self.tried[rate] = seconds

    def found(self) -> Found:
        """Return the rate at the bound, between two neighbours as if the logarithm of the time grew with that of the rate.

        Raises ValueError if nothing was tried.
        """
        within, beyond = self._sides()
        if not beyond:
            return Found(max(within), "at least")
        if not within:
            return Found(min(beyond), "at most")
        low, high = within[-1], beyond[0]
        share = math.log(self.bound / self.tried[low]) / math.log(self.tried[high] / self.tried[low])
        return Found(low * (high / low) ** share, "between")

    def _sides(self) -> tuple[list[float], list[float]]:
        rates = sorted(self.tried)
        return [each for each in rates if self.tried[each] <= self.bound], [
            each for each in rates if self.tried[each] > self.bound
        ]
