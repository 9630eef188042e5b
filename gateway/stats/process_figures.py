"""The figures of the gateway itself, beside those of its fleets: its own counts, limits, other nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from gateway import __version__
from gateway.limits.shapes import SharedLimitStats, TenantUse
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.relay.counters import RelayCounters
from gateway.stats.node_stats import NodeStats
from gateway.stats.shapes import GatewayStats


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """The part of KvStats that is the same for every model."""

    gateway: GatewayStats
    limits: list[TenantUse]
    shared_limits: SharedLimitStats | None
    nodes: list[NodeStats]


class ProcessFigures:
    """Belongs to the event loop's thread.

    `relay_counts` returns the relay's counters and how many requests it is serving, `limit_uses` what tenants used of their
    limits, and `shared_limits` counts them for several gateways.
    """

    def __init__(
        self,
        relay_counts: Callable[[], tuple[RelayCounters, int]],
        *,
        limit_uses: Callable[[], list[TenantUse]] = list,
        shared_limits: SharedLimits | None = None,
        nodes: Callable[[], list[NodeStats]] = list,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._relay_counts = relay_counts
        self._limit_uses = limit_uses
        self._shared_limits = shared_limits
        self._nodes = nodes
        self._clock = clock
        self._started = clock()

    def stats(self) -> ProcessStats:
        """Return them as they are now."""
        counters, in_flight = self._relay_counts()
        uptime = self._clock() - self._started
        return ProcessStats(
            gateway=GatewayStats(version=__version__, uptime_seconds=uptime, in_flight=in_flight, **asdict(counters)),
            limits=self._limit_uses(),
            shared_limits=None if self._shared_limits is None else self._shared_limits.stats(),
            nodes=self._nodes(),
        )

    def warnings(self) -> list[str]:
        """What an operator should know of the server of shared limits."""
        return [] if self._shared_limits is None else self._shared_limits.warnings()
