"""Medians, quantiles and the spread around them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of `count` values with the least and the most of them."""

    median: float
    least: float
    most: float
    count: int


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of `values`, None if there are none."""
    return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed. Raises ValueError if there are none."""
    if not values:
        raise ValueError("no values have no quantile")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]
