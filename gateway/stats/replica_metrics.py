"""vLLM's own metrics of all replicas, asked for when somebody scrapes ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from engine.fleet import FleetView, Replica, ReplicaState
from gateway.stats.exposition import Family, labelled_families, merged
from gateway.upstream.pool import Upstream, UpstreamLost

ANSWER_SECONDS_MAX = 1.0
"""For all replicas together: Prometheus gives up after ten seconds, unless told otherwise."""
ANSWER_BYTES_MAX = 2 << 20
_PATH = "/metrics"
_ASKED = frozenset({ReplicaState.READY, ReplicaState.DRAINING})

_logger = logging.getLogger(__name__)


class ReplicaMetrics:
    """Belongs to one event loop."""

    def __init__(self, fleets: Sequence[FleetView], upstream: Upstream) -> None:
        self._fleets = fleets
        self._upstream = upstream

    async def render(self) -> bytes:
        """What the replicas say, in Prometheus' text format. One that does not answer in time is left out."""
        replicas = [each for fleet in self._fleets for each in fleet.snapshot().replicas if each.state in _ASKED]
        found = await asyncio.gather(*map(self._ask, replicas))
        registry = CollectorRegistry()
        answered = Gauge(
            "peerkv_replica_metrics_answered", "1 if the replica's own metrics are here.", ("replica",), registry=registry
        )
        for replica, families in zip(replicas, found, strict=True):
            answered.labels(replica.name).set(bool(families))
        return generate_latest(registry) + merged(found)

    async def _ask(self, replica: Replica) -> list[Family]:
        try:
            text = await self._upstream.get_bytes(replica, _PATH, seconds_max=ANSWER_SECONDS_MAX, bytes_max=ANSWER_BYTES_MAX)
        except UpstreamLost as error:
            _logger.debug("no metrics of a replica: %s", error)
            return []
        return list(labelled_families(text, replica.name))
