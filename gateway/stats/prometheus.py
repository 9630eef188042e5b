"""Prometheus metrics: what the front door measures itself, and all that /kv/stats counts, read when somebody asks."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.planner.plan import SteeringStats
from gateway.prompts.parity import Parity, ParityCounts
from gateway.relay.request_record import RequestRecord
from gateway.stats.ledger_metrics import ImportTimes, ledger_metrics
from gateway.stats.limit_metrics import admission_metrics, limit_metrics, shared_limit_metrics
from gateway.stats.node_stats import node_metrics
from gateway.stats.request_metrics import RequestMetrics
from gateway.stats.shapes import GatewayStats, HostMemoryStats, KvStats, ReplicaStats, descriptions
from gateway.stats.tallies import Histogram, Tally
from gateway.stats.tier_metrics import tier_metrics
from gateway.steering.costs.model import CostStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_T = TypeVar("_T")
_Figure = tuple[str, str, Callable[[_T], float]]
"""Name, help text, and how it is read."""

_REPLICA_COUNTERS: tuple[_Figure[ReplicaStats], ...] = (
    ("peerkv_requests", "Requests that the replica scheduled.", lambda r: r.counts.requests),
    ("peerkv_imports", "Imports from another replica.", lambda r: r.counts.imports),
    ("peerkv_import_blocks", "Blocks imported.", lambda r: r.counts.import_blocks),
    ("peerkv_import_bytes", "Bytes of KV imported.", lambda r: r.counts.import_bytes),
    ("peerkv_import_seconds", "Time spent in imports.", lambda r: r.counts.import_seconds),
    ("peerkv_check_failures", "Blocks that changed while they were copied.", lambda r: r.counts.check_failures),
    ("peerkv_fallbacks", "Requests computed because their import failed.", lambda r: r.counts.fallbacks),
    ("peerkv_published_blocks", "Blocks offered to other replicas.", lambda r: r.counts.published_blocks),
    ("peerkv_evictions", "Offered blocks that were reallocated.", lambda r: r.counts.evictions),
    ("peerkv_restarts", "Restarts of the replica.", lambda r: r.restarts),
    ("peerkv_ejections", "Times that it was ejected for failing answers.", lambda r: r.ejections),
)
_REPLICA_GAUGES: tuple[_Figure[ReplicaStats], ...] = (
    ("peerkv_replica_ready", "1 while the replica takes requests.", lambda r: float(r.state == "ready")),
    ("peerkv_replica_exchanges", "1 while others can import from the replica.", lambda r: float(r.exchanges == "ok")),
    ("peerkv_replica_well", "1 while it is neither suspect nor ejected.", lambda r: float(r.standing in ("well", "half-open"))),
    ("peerkv_blocks", "Size of the replica's KV cache in blocks.", lambda r: r.blocks),
    ("peerkv_cached_blocks", "Blocks that the replica offers now.", lambda r: r.cached_blocks),
    ("peerkv_in_flight_requests", "Requests that the gateway has with the replica.", lambda r: r.in_flight),
    ("peerkv_incompatible_replicas", "Replicas that it cannot exchange with.", lambda r: len(r.incompatible)),
)

_TIER_COUNTERS: tuple[_Figure[HostMemoryStats], ...] = (
    ("peerkv_host_memory_stores", "Blocks stored in host memory.", lambda t: t.stores),
    ("peerkv_host_memory_evictions", "Stored blocks that gave way or were flushed.", lambda t: t.evictions),
    (
        "peerkv_host_memory_ahead_blocks",
        "Blocks that began to be stored before they were reallocated.",
        lambda t: t.ahead_blocks,
    ),
    ("peerkv_host_memory_dropped_blocks", "Blocks lost as too many were being stored.", lambda t: t.dropped_blocks),
    ("peerkv_host_memory_imports", "Imports from host memory.", lambda t: t.imports),
    ("peerkv_host_memory_import_blocks", "Blocks restored.", lambda t: t.import_blocks),
    ("peerkv_host_memory_import_bytes", "Bytes restored.", lambda t: t.import_bytes),
    ("peerkv_host_memory_import_failures", "Imports from it that fell short.", lambda t: t.import_failures),
)
_TIER_GAUGES: tuple[_Figure[HostMemoryStats], ...] = (
    ("peerkv_host_memory_blocks", "Slots for blocks in host memory.", lambda t: t.blocks),
    ("peerkv_host_memory_stored_blocks", "Blocks that can be restored now.", lambda t: t.stored_blocks),
    ("peerkv_host_memory_bytes", "Size of the slots.", lambda t: t.bytes),
)


class Metrics:
    """What the front door measures for each request. One per process; `attach` adds everything that /kv/stats counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._answers = Tally("peerkv_gateway_answers", "Answered requests.", ("endpoint", "status"))
        self._seconds = Histogram(
            "peerkv_gateway_request_seconds", "From a request's arrival to the end of its answer.", "endpoint", _SECONDS
        )
        self._first = Histogram(
            "peerkv_gateway_first_byte_seconds",
            "From a request's arrival to the first byte of its answer.",
            "endpoint",
            _SECONDS,
        )
        self._requests = RequestMetrics()
        for collector in (self._answers, self._seconds, self._first, self._requests):
            self.registry.register(collector)
        self.imports = ImportTimes(self.registry)

    def answered(self, record: RequestRecord) -> None:
        """A request is over."""
        endpoint = record.endpoint
        self._answers.add(endpoint, record.status)
        self._seconds.add(endpoint, record.seconds)
        if record.first_byte_seconds is not None:
            self._first.add(endpoint, record.first_byte_seconds)
        self._requests.add(record)

    def attach(self, snapshots: Callable[[], Sequence[KvStats]]) -> None:
        """Also show what `snapshots` returns at each scrape: one for each fleet."""
        self.registry.register(_StatsCollector(snapshots))

    def render(self) -> bytes:
        """Return the body of GET /metrics, of type CONTENT_TYPE."""
        return generate_latest(self.registry)


class _StatsCollector(Collector):
    """Turns snapshots into metrics; those of a replica have a `replica` label, those of several fleets a `model` label too."""

    def __init__(self, snapshots: Callable[[], Sequence[KvStats]]) -> None:
        self._snapshots = snapshots

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would take a snapshot

    def collect(self) -> Iterator[Metric]:
        found = self._snapshots()
        yield from _gateway_metrics(found[0].gateway)
        if len(found) == 1:
            yield from _fleet_metrics(found[0])
        else:
            yield from _by_model({stats.model: _fleet_metrics(stats) for stats in found})
        yield from limit_metrics(found[0].limits)
        yield from node_metrics(found[0].nodes)
        if found[0].shared_limits is not None:
            yield from shared_limit_metrics(found[0].shared_limits)


def _by_model(found: Mapping[str, Iterable[Metric]]) -> Iterable[Metric]:
    """The metrics of several fleets, each with its model as a label.

    A label of that name becomes `exported_model`, as Prometheus would name it: two fleets may have one model, by two names.
    """
    families: dict[str, Metric] = {}
    for model, metrics in found.items():
        for metric in metrics:
            family = families.setdefault(metric.name, metric)
            labelled = [sample._replace(labels={"model": model, **_exported(sample.labels)}) for sample in metric.samples]
            family.samples = labelled if family is metric else family.samples + labelled
    return families.values()


def _exported(labels: Mapping[str, str]) -> dict[str, str]:
    return {"exported_model" if name == "model" else name: value for name, value in labels.items()}


def _fleet_metrics(stats: KvStats) -> Iterator[Metric]:
    yield from _steering_metrics(stats)
    yield from _replica_metrics(stats)
    yield from ledger_metrics(stats)
    yield from cost_metrics(stats.costs)
    yield from tier_metrics(stats.tiers)
    yield from admission_metrics(stats.queue)


def _gateway_metrics(gateway: GatewayStats) -> Iterator[Metric]:
    for field, text in descriptions(GatewayStats).items():
        if field not in ("version", "uptime_seconds", "in_flight"):
            yield CounterMetricFamily(f"peerkv_gateway_{field}", text, value=getattr(gateway, field))
    yield GaugeMetricFamily("peerkv_gateway_in_flight_requests", "Requests being served.", value=gateway.in_flight)
    yield GaugeMetricFamily("peerkv_gateway_uptime_seconds", "Age of the gateway.", value=gateway.uptime_seconds)


def _steering_metrics(stats: KvStats) -> Iterator[Metric]:
    for field, text in descriptions(SteeringStats).items():
        yield CounterMetricFamily(f"peerkv_steering_{field}", text, value=getattr(stats.steering, field))
    for count, about in descriptions(ParityCounts).items():
        text = f"Token ids compared with an engine's: {about}."
        yield CounterMetricFamily(f"peerkv_parity_{count}", text, value=getattr(stats.parity, count))
    exact = GaugeMetricFamily("peerkv_parity_exact", "1 if our token ids are the engine's.", labels=("kind",))
    verdicts = GaugeMetricFamily(
        "peerkv_parity_verdict", "1 for the result of the last comparison of token ids.", labels=("kind", "verdict")
    )
    differences = GaugeMetricFamily("peerkv_parity_differences", "Canaries whose ids are not the engine's.", labels=("kind",))
    for kind, verdict in (("completions", stats.parity.completions), ("chat", stats.parity.chat)):
        exact.add_metric((kind,), float(verdict.parity == Parity.EXACT))
        for each in Parity:
            verdicts.add_metric((kind, each.value), float(verdict.parity == each))
        differences.add_metric((kind,), len(verdict.differences))
    yield exact
    yield verdicts
    yield differences


def _replica_metrics(stats: KvStats) -> Iterator[Metric]:
    tokens = CounterMetricFamily(
        "peerkv_prompt_tokens", "Prompt tokens by where their KV came from.", labels=("replica", "source")
    )
    for replica in stats.replicas:
        for source, count in replica.tokens.by_source().items():
            tokens.add_metric((replica.name, source), count)
    yield tokens
    yield from _by_replica({replica.name: replica for replica in stats.replicas}, _REPLICA_COUNTERS, _REPLICA_GAUGES)
    yield from _by_replica({tier.replica: tier for tier in stats.host_memory}, _TIER_COUNTERS, _TIER_GAUGES)


def _by_replica(shown: Mapping[str, _T], counters: Iterable[_Figure[_T]], gauges: Iterable[_Figure[_T]]) -> Iterator[Metric]:
    """The figures of what is `shown`, by the name of its replica."""
    for family, figures in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
        for name, text, read in figures:
            metric = family(name, text, labels=("replica",))
            for replica, one in shown.items():
                metric.add_metric((replica,), read(one))
            yield metric


def cost_metrics(costs: CostStats) -> Iterator[Metric]:
    """The fitted terms, labelled by what they are of."""
    yield CounterMetricFamily("peerkv_cost_samples", "Answered requests that the cost model learnt from.", value=costs.samples)
    if costs.median_error is not None:
        text = "Relative error of the expected time to the first token, median of the last requests."
        yield GaugeMetricFamily("peerkv_cost_median_error", text, value=costs.median_error)
    prefill = GaugeMetricFamily(
        "peerkv_cost_prefill_seconds", "Fitted cost terms of computing a prompt.", labels=("device", "model", "term")
    )
    for one in costs.prefill:
        for term, value in asdict(one).items():
            if "seconds" in term:
                prefill.add_metric((one.device, one.model, term), value)
    yield prefill
    pair = ("taker", "source", "transport")
    fixed = GaugeMetricFamily(
        "peerkv_cost_transfer_fixed_seconds", "Fitted fixed time of an import, without its bytes.", labels=pair
    )
    rate = GaugeMetricFamily("peerkv_cost_transfer_bytes_per_second", "Fitted rate of imports.", labels=pair)
    for each in costs.transfers:
        labels = (each.taker, each.source, each.transport)
        fixed.add_metric(labels, each.fixed_seconds)
        rate.add_metric(labels, each.bytes_per_second)
    yield fixed
    yield rate
