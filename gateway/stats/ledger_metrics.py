"""The ledger's part of /metrics: misses by reason, imports by peer and transport, engines' load, and how long imports took."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.block_registry.tables import Table
from gateway.ledger.stats import LedgerStats
from gateway.stats.shapes import KvStats, PeerStats, descriptions
from transport.node.source_way import import_way
from transport.table.deliveries import Delivery, EngineLoad

_IMPORT_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


_BY_REASON = frozenset({"requests", "lost_tokens"})


_PEER_COUNTERS: tuple[tuple[str, str, Callable[[PeerStats], float]], ...] = (
    ("imports", "Imports from another replica, by replica and transport.", lambda peer: peer.imports),
    ("blocks", "Blocks imported, by replica and transport.", lambda peer: peer.blocks),
    ("bytes", "Bytes of KV imported, by replica and transport.", lambda peer: peer.bytes),
    ("seconds", "Time of the copies, by replica and transport.", lambda peer: peer.seconds),
    ("failures", "Imports that fell short, by replica and transport.", lambda peer: peer.failures),
)


SEVERAL = "(several)"
"""The peer and the transport of an import that had more than one source: its copies and its wait are none of theirs alone."""


class ImportTimes:
    """Histograms of imports, fed by the engines' delivery records."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("replica", "peer", "transport")
        self._copy = Histogram(
            "peerkv_import_copy_seconds", "The copies of one import.", labels, buckets=_IMPORT_SECONDS, registry=registry
        )
        self._wait = Histogram(
            "peerkv_import_wait_seconds",
            "How long a request waited for its import, from the allocation of its blocks.",
            labels,
            buckets=_IMPORT_SECONDS,
            registry=registry,
        )

    def delivered(self, replica: str, table: Table, delivery: Delivery) -> None:
        """Record an import, if the delivery record describes one."""
        if delivery.import_wait_ns:
            labels = (replica, delivery.source, import_way(table.transport, delivery.source, replica))
            if delivery.further:
                labels = (replica, SEVERAL, SEVERAL)
            self._copy.labels(*labels).observe(delivery.import_ns / 1e9)
            self._wait.labels(*labels).observe(delivery.import_wait_ns / 1e9)


def ledger_metrics(stats: KvStats) -> Iterator[Metric]:
    """Yield everything in a snapshot about the ledger and the engines' own figures."""
    yield from _sums(stats.ledger)
    yield from _peers(stats)
    yield from _loads(stats)


def _sums(ledger: LedgerStats) -> Iterator[Metric]:
    for field, about in descriptions(LedgerStats).items():
        text = f"Requests served: {about}."
        if field == "kept":
            yield GaugeMetricFamily("peerkv_ledger_kept_requests", text, value=ledger.kept)
        elif field in _BY_REASON:
            counter = CounterMetricFamily(f"peerkv_ledger_{field}", text, labels=("reason",))
            for reason, count in getattr(ledger, field).items():
                counter.add_metric((reason,), count)
            yield counter
        else:
            yield CounterMetricFamily(f"peerkv_ledger_{field}", text, value=getattr(ledger, field))


def _peers(stats: KvStats) -> Iterator[Metric]:
    for name, text, read in _PEER_COUNTERS:
        counter = CounterMetricFamily(f"peerkv_peer_import_{name}", text, labels=("replica", "peer", "transport"))
        for replica in stats.replicas:
            for peer in replica.peers:
                counter.add_metric((replica.name, peer.name, peer.transport), read(peer))
        yield counter


def _loads(stats: KvStats) -> Iterator[Metric]:
    for field, about in descriptions(EngineLoad).items():
        gauge = GaugeMetricFamily(f"peerkv_engine_{field}", f"Of the engine: {about}.", labels=("replica",))
        for replica in stats.replicas:
            gauge.add_metric((replica.name,), getattr(replica.load, field))
        yield gauge
