"""Metrics of requests by tenant and model: times to tokens, queues, and tokens by where they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.relay.frontdoor import OTHER_LABEL
from gateway.relay.request_record import RequestRecord
from gateway.stats.request_times import first_token_seconds, queue_seconds
from gateway.stats.tallies import Times
from gateway.stats.token_sources import token_sources

PAIRS_MAX = 128
"""So many pairs of tenant and model have series of their own; any further ones are counted together, as OTHERS."""
OTHERS = "(others)"
FIRST_TOKEN_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0),
    *(10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TOKEN_SECONDS = (0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
QUEUE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_PAIR = ("tenant", "model")
_SOURCES = ("local", "peer", "host_memory", "disk", "vault", "computed", "unknown")


class _Series:
    """What is counted of one tenant's requests to one model."""

    __slots__ = ("first_token", "generated_tokens", "output_token", "prompt_tokens", "queue", "statuses")

    def __init__(self) -> None:
        self.first_token = {False: Times(FIRST_TOKEN_SECONDS), True: Times(FIRST_TOKEN_SECONDS)}
        self.output_token = Times(TOKEN_SECONDS)
        self.queue = Times(QUEUE_SECONDS)
        self.statuses: dict[int, int] = {}
        self.prompt_tokens = [0] * len(_SOURCES)
        self.generated_tokens = 0


class RequestMetrics(Collector):
    """Belongs to the event loop's thread. The requests of the label OTHER_LABEL carry no prompt and are left out."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], _Series] = {}

    def add(self, record: RequestRecord) -> None:
        """A request is over."""
        if record.endpoint == OTHER_LABEL:
            return
        series = self._series.get((record.tenant, record.model)) or self._new(record.tenant, record.model)
        series.statuses[record.status] = series.statuses.get(record.status, 0) + 1
        if record.attempt is None:
            return
        self._count_tokens(series, record)
        waited = queue_seconds(record)
        if waited is not None:
            series.queue.add(waited)
        first = first_token_seconds(record)
        if first is None:
            return
        series.first_token[record.streamed].add(first)
        further = record.completion_tokens - 1
        if further > 0 and len(record.attempt.deliveries) <= 1:  # of several choices, tokens come side by side
            series.output_token.add((record.seconds - first) / further)

    def _count_tokens(self, series: _Series, record: RequestRecord) -> None:
        assert record.attempt is not None
        series.generated_tokens += record.completion_tokens
        counts, sources = series.prompt_tokens, token_sources(record.attempt)
        if sources is not None:
            counts[0] += sources.local  # in the order of _SOURCES
            counts[1] += sources.peer
            counts[2] += sources.host_memory
            counts[3] += sources.disk
            counts[4] += sources.vault
            counts[5] += sources.computed
        elif record.usage is not None:
            counts[-1] += record.usage.prompt_tokens

    def _new(self, *pair: str) -> _Series:
        if len(self._series) >= PAIRS_MAX:
            return self._series.setdefault((OTHERS, OTHERS), _Series())
        return self._series.setdefault((pair[0], pair[1]), _Series())

    def collect(self) -> Iterator[Metric]:
        """Return the metrics in Prometheus' form."""
        first = HistogramMetricFamily(
            "peerkv_time_to_first_token_seconds",
            "From a request's arrival to its first token: a stream's first event, and of other answers the engine's word.",
            labels=(*_PAIR, "stream"),
        )
        for pair, series in self._series.items():
            for streamed, times in series.first_token.items():
                first.add_metric((*pair, str(streamed).lower()), times.buckets(), times.seconds)
        yield first
        yield self._histogram(
            "peerkv_time_per_output_token_seconds",
            "Mean time between the tokens of an answer after the first one, of answers with one choice.",
            lambda series: series.output_token,
        )
        yield self._histogram(
            "peerkv_queue_seconds", "How long a request waited in its engine for its first step.", lambda series: series.queue
        )
        yield self._counter(
            "peerkv_tenant_requests",
            "Requests that are over, by status: 499 if the client left, 0 if it got nothing.",
            "status",
            lambda series: [(str(status), count) for status, count in series.statuses.items()],
        )
        yield self._counter(
            "peerkv_tenant_prompt_tokens",
            "Tokens of prompts by where their KV came from; unknown where the engine left no record.",
            "source",
            lambda series: list(zip(_SOURCES, series.prompt_tokens, strict=True)),
        )
        generated = CounterMetricFamily(
            "peerkv_tenant_generated_tokens", "Tokens generated; those of streams without usage by their events.", labels=_PAIR
        )
        for pair, series in self._series.items():
            generated.add_metric(pair, series.generated_tokens)
        yield generated

    def _histogram(self, name: str, text: str, times_of: Callable[[_Series], Times]) -> Metric:
        family = HistogramMetricFamily(name, text, labels=_PAIR)
        for pair, series in self._series.items():
            times = times_of(series)
            family.add_metric(pair, times.buckets(), times.seconds)
        return family

    def _counter(self, name: str, text: str, label: str, counts: Callable[[_Series], Sequence[tuple[str, int]]]) -> Metric:
        family = CounterMetricFamily(name, text, labels=(*_PAIR, label))
        for pair, series in self._series.items():
            for value, count in counts(series):
                family.add_metric((*pair, value), count)
        return family
