"""The body of GET /kv/stats: each replica's share in serving prompts from caches, and the fleet's."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace

from engine.fleet import FleetView, Replica, ReplicaState
from engine.frame_tiers.messages import TierStats
from gateway.block_registry.fleet_state import obstacles
from gateway.block_registry.lifetime_counters import LifetimeCounters
from gateway.block_registry.tables import Table
from gateway.ledger.recorder import Recorder
from gateway.limits.shapes import QueueStats
from gateway.planner.planner import Planner
from gateway.planner.promotions import Promotions
from gateway.prompts.parity import ParityCounts, ParityVerdict
from gateway.prompts.tokenizer.service import TokenService
from gateway.stats.process_figures import ProcessStats
from gateway.stats.shapes import (
    HostMemoryStats,
    KvStats,
    ParityStats,
    PeerStats,
    ReplicaStats,
    TiersBelow,
    TokenCounts,
    Totals,
    TransferCounts,
    group_stats,
)
from gateway.steering.outliers import Ejection
from transport.table.deliveries import EngineLoad, PeerCounters
from transport.table.tiers import HOST_MEMORY, tier_kind


class StatsView:
    """Assembles the snapshot of one fleet."""

    def __init__(
        self,
        fleet: FleetView,
        planner: Planner,
        tokens: TokenService,
        recorder: Recorder,
        clock: Callable[[], float] = time.monotonic,
        queue: Callable[[], QueueStats] = QueueStats,
    ) -> None:
        self._fleet = fleet
        self._planner = planner
        self._tokens = tokens
        self._recorder = recorder
        self._queue = queue
        self._clock = clock

    def snapshot(self, process: ProcessStats) -> KvStats:
        """Return the state of everything now; `process` is that of the gateway itself."""
        fleet = self._fleet.snapshot()
        self._recorder.catch_up()
        ledger = self._recorder.ledger
        tables, counters = self._planner.fleet.now().tables, self._planner.lifetime_counters
        in_flight = self._planner.in_flight()
        outliers, now = self._planner.outliers, self._clock()
        replicas = [
            _replica_stats(replica, tables, counters, in_flight.get(replica.name, 0), outliers.seen(replica.name, now))
            for replica in fleet.replicas
        ]
        return KvStats(
            model=fleet.served_model_name or fleet.model,
            gateway=process.gateway,
            steering=replace(self._planner.counts),
            costs=self._planner.costs.report(),
            ledger=ledger.sums.shown(len(ledger), self._recorder.feed.missed),
            tokenizer=self._tokens.state,
            parity=_parity_stats(self._planner.prompts.parity, self._planner.prompts.parity_counts),
            totals=_totals(replicas, counters),
            replicas=replicas,
            host_memory=host_memory_stats(self._planner.fleet.latest.tiers, replicas),
            tiers=_tier_stats(self._planner.promotions, replicas),
            queue=self._queue(),
            limits=process.limits,
            shared_limits=process.shared_limits,
            nodes=process.nodes,
        )


def token_counts(counters: Mapping[str, int]) -> TokenCounts:
    """Return the token counts among a table's counters."""
    return TokenCounts(
        prompt=counters.get("prompt_tokens", 0),
        local=counters.get("local_tokens", 0),
        peer_shared_memory=counters.get("peer_tokens_shared_memory", 0),
        peer_cuda_ipc=counters.get("peer_tokens_cuda_ipc", 0),
        host_memory=counters.get("tier_tokens_host_memory", 0),
        disk=counters.get("tier_tokens_disk", 0),
        vault=counters.get("tier_tokens_vault", 0),
        computed=counters.get("computed_tokens", 0),
    )


def transfer_counts(counters: Mapping[str, int]) -> TransferCounts:
    """Return the rest of a table's counters."""
    seconds = counters.get("import_nanoseconds", 0) / 1e9
    same = {name: counters.get(name, 0) for name in TransferCounts.model_fields if name != "import_seconds"}
    return TransferCounts(import_seconds=seconds, **same)


def _replica_stats(
    replica: Replica, tables: Mapping[str, Table], lifetime: LifetimeCounters, in_flight: int, ejection: Ejection
) -> ReplicaStats:
    table = tables.get(replica.name)
    counters = lifetime.counters(replica.name)
    others = {name: obstacles(table, other) for name, other in tables.items() if name != replica.name} if table else {}
    return ReplicaStats(
        name=replica.name,
        state=replica.state.value,
        reason=replica.reason,
        device=replica.device,
        restarts=replica.restarts,
        standing=ejection.standing,
        standing_reason=ejection.why,
        ejected_seconds=ejection.seconds_left,
        ejections=ejection.ejections,
        epochs=lifetime.epochs(replica.name),
        exchanges=table.status if table else "it has no block table",
        transport=table.transport if table else "",
        fingerprint=table.fingerprint.hex() if table else "",
        incompatible={name: list(found) for name, found in others.items() if found},
        groups=group_stats(table.groups if table else ()),
        block_size=table.block_size if table else 0,
        blocks=table.num_blocks if table else 0,
        cached_blocks=table.cached_blocks() if table else 0,
        in_flight=in_flight,
        load=table.load() if table else EngineLoad(),
        tokens=token_counts(counters),
        counts=transfer_counts(counters),
        peers=peer_stats(lifetime.peers(replica.name)),
    )


def _totals(replicas: list[ReplicaStats], lifetime: LifetimeCounters) -> Totals:
    summed: dict[str, int] = {}
    for name in lifetime.names():
        for counter, count in lifetime.counters(name).items():
            summed[counter] = summed.get(counter, 0) + count
    return Totals(
        replicas=len(replicas),
        ready=sum(replica.state == ReplicaState.READY.value for replica in replicas),
        blocks=sum(replica.blocks for replica in replicas),
        cached_blocks=sum(replica.cached_blocks for replica in replicas),
        in_flight=sum(replica.in_flight for replica in replicas),
        tokens=token_counts(summed),
        counts=transfer_counts(summed),
    )


def host_memory_stats(tiers: Mapping[str, Table], replicas: Iterable[ReplicaStats]) -> list[HostMemoryStats]:
    """Return what the tiers hold, and what `replicas` imported from each."""
    found = []
    read = [peer for replica in replicas for peer in replica.peers]
    for name, table in sorted(tiers.items()):
        if tier_kind(name) != "host_memory":
            continue
        counters, mine = table.counters(), [peer for peer in read if peer.name == name]
        found.append(
            HostMemoryStats(
                name=name,
                replica=name.removesuffix(HOST_MEMORY),
                blocks=table.num_blocks,
                stored_blocks=table.cached_blocks(),
                bytes=table.slot_bytes() * table.num_blocks,
                stores=counters["published_blocks"],
                evictions=counters["evictions"],
                ahead_blocks=counters["tier_ahead_blocks"],
                dropped_blocks=counters["tier_dropped_blocks"],
                imports=sum(peer.imports for peer in mine),
                import_blocks=sum(peer.blocks for peer in mine),
                import_bytes=sum(peer.bytes for peer in mine),
                import_failures=sum(peer.failures for peer in mine),
            )
        )
    return found


def _tier_stats(promotions: Promotions, replicas: Iterable[ReplicaStats]) -> TiersBelow:
    """Return what disk and vault hold and did."""
    heard = promotions.tiers.latest or TierStats()
    read = [peer for replica in replicas for peer in replica.peers if tier_kind(peer.name) in ("disk", "vault")]
    return TiersBelow(
        stores=list(heard.stores),
        lost_blocks=heard.lost_blocks,
        unknown_blocks=heard.unknown_blocks,
        promotions=heard.promotions,
        promotions_late=heard.promotions_late,
        staged_blocks=heard.staged_blocks,
        import_blocks=sum(peer.blocks for peer in read),
        import_failures=sum(peer.failures for peer in read),
        asked=replace(promotions.counts),
    )


def _parity_stats(verdict: ParityVerdict, counts: ParityCounts) -> ParityStats:
    return ParityStats(replica=verdict.replica, completions=verdict.completions, chat=verdict.chat, **asdict(counts))


def peer_stats(peers: Iterable[PeerCounters]) -> list[PeerStats]:
    """Return what was imported by peer, and at what rate."""
    return [
        PeerStats(**asdict(peer), gigabytes_per_second=peer.bytes / 1e9 / peer.seconds if peer.seconds else 0.0)
        for peer in peers
    ]
