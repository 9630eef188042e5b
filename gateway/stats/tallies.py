"""Counters and histograms of the hot path: plain numbers that become Prometheus metrics when somebody asks.

prometheus_client's own metrics take a lock and walk over all buckets of a histogram at each observation.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Times:
    """A histogram of durations: `counts[i]` counts those up to bound i in seconds and above the previous one."""

    __slots__ = ("bounds", "counts", "created", "seconds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.seconds = 0.0
        self.created = time.time()

    def add(self, seconds: float) -> None:
        """Record one more duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.seconds += seconds

    def buckets(self) -> list[tuple[str, int]]:
        """The upper bounds, each with the number of durations up to it."""
        total, found = 0, []
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, total))
        return found


class Histogram(Collector):
    """Times by the value of one label."""

    def __init__(self, name: str, text: str, label: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._label, self._bounds = name, text, label, bounds
        self._times: dict[str, Times] = {}

    def add(self, value: str, seconds: float) -> None:
        """Record one more duration under the label's `value`."""
        times = self._times.get(value)
        if times is None:
            times = self._times[value] = Times(self._bounds)
        times.add(seconds)

    def collect(self) -> Iterator[Metric]:
        """Return the metric in Prometheus' form, with cumulative buckets."""
        family = HistogramMetricFamily(self._name, self._text, labels=(self._label,))
        for value, times in self._times.items():
            family.add_metric((value,), times.buckets(), times.seconds)
            family.add_sample(self._name + "_created", {self._label: value}, times.created)
        yield family


class Tally(Collector):
    """A counter by the values of its labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._counts: dict[tuple[str | int, ...], list[float]] = {}  # the count, and when it began in Unix time

    def add(self, *values: str | int) -> None:
        """Count one more."""
        found = self._counts.get(values)
        if found is None:
            found = self._counts[values] = [0, time.time()]
        found[0] += 1

    def collect(self) -> Iterable[Metric]:
        """Return the metric."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, (count, created) in self._counts.items():
            family.add_metric([str(value) for value in values], count, created=created)
        yield family
