"""The shapes of GET /kv/stats, as far as they are not those of what is counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, Field, TypeAdapter

from engine.frame_tiers.store import StoreStats
from gateway.ledger.stats import LedgerStats
from gateway.limits.shapes import QueueStats, SharedLimitStats, TenantUse
from gateway.planner.plan import SteeringStats
from gateway.planner.promotions import PromotionCounts
from gateway.prompts.parity import KindVerdict, ParityCounts
from gateway.prompts.tokenizer.service import TokenizerStats
from gateway.relay.counters import RelayCounters
from gateway.stats.node_stats import NodeStats
from gateway.steering.costs.model import CostStats
from gateway.steering.outliers import OutlierState
from transport.groups import Group
from transport.table.deliveries import EngineLoad, PeerCounters


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStats(PeerCounters):
    """What a replica imported from one other replica."""

    gigabytes_per_second: Annotated[float, Field(description="1e9 bytes per second of copying; 0 without imports")]


class TokenCounts(BaseModel):
    """Prompt tokens by where their KV came from. `prompt` is the sum of the others, each prompt counted once."""

    prompt: int = Field(0, description="prompt tokens scheduled")
    local: int = Field(0, description="from the replica's own prefix cache")
    peer_shared_memory: int = Field(0, description="from another replica, through shared memory")
    peer_cuda_ipc: int = Field(0, description="from another replica, through CUDA IPC")
    host_memory: int = Field(0, description="restored from host memory")
    disk: int = Field(0, description="restored from the disk")
    vault: int = Field(0, description="restored from the vault")
    computed: int = Field(0, description="computed")

    def by_source(self) -> dict[str, int]:
        """Return the parts by name, without their sum."""
        return {name: count for name, count in self.model_dump().items() if name != "prompt"}


class TransferCounts(BaseModel):
    """Counts of what was imported and what was not."""

    requests: int = Field(0, description="requests scheduled")
    imports: int = Field(0, description="imports from another replica")
    import_blocks: int = Field(0, description="blocks imported")
    import_bytes: int = Field(0, description="bytes imported")
    import_seconds: float = Field(0.0, description="time spent in imports, seconds")
    check_failures: int = Field(0, description="blocks that changed while they were copied, and were computed instead")
    fallbacks: int = Field(0, description="requests that computed because their import failed")
    published_blocks: int = Field(0, description="blocks offered to other replicas")
    evictions: int = Field(0, description="offered blocks that were reallocated")
    peers_incompatible: int = Field(0, description="other replicas' tables refused because their fingerprints differ")
    table_errors: int = Field(
        0, description="other replicas' tables that could not be used, odd requests, and host memory that failed its self-test"
    )
    pins: int = Field(0, description="prefixes that were pinned")
    pins_refused: int = Field(0, description="pins that were requested but refused")
    hints_malformed: int = Field(0, description="fields of hints that were ignored")


class GroupStats(BaseModel):
    """A KV cache group of the model: layers that need the same blocks of a prefix."""

    kind: str = Field(description="full: all blocks; window, chunk: those that the next token sees; state: the last one")
    layers: int
    block_size: int = Field(description="tokens per block")
    window: int = Field(description="tokens that a sliding window or a chunk spans; 0 for others")
    block_bytes: int = Field(description="bytes of one block, in all its layers on one rank")
    token_bytes: float = Field(description="bytes of each imported token on one rank; 0 where only a prefix's end is needed")
    import_bytes: float = Field(description="bytes that every long import has on one rank: a window, half a chunk or a state")


def group_stats(groups: Iterable[Group]) -> list[GroupStats]:
    """Return what is told of KV cache groups."""
    return [
        GroupStats(
            kind=group.kind,
            layers=group.layers,
            block_size=group.block_size,
            window=group.window,
            block_bytes=group.bytes,
            token_bytes=group.token_bytes,
            import_bytes=group.import_bytes,
        )
        for group in groups
    ]


class ReplicaStats(BaseModel):
    """One replica. Counts span all its restarts since the gateway started watching."""

    name: str
    state: str = Field(description="starting, ready, draining, backoff, failed or stopped")
    reason: str = Field(description="why it is not ready, in words")
    device: str
    restarts: int
    standing: OutlierState = Field(OutlierState.WELL, description="well, ejected, half-open, or suspect: see /ready")
    standing_reason: str = Field("", description="why it is not well, in words")
    ejected_seconds: float = Field(0.0, description="time until an ejected replica is tried again, seconds")
    ejections: int = Field(0, description="times it was ejected for failed answers since it was last started")
    epochs: int = Field(description="process starts seen by this gateway")
    exchanges: str = Field(description='"ok", or why it exchanges no KV')
    transport: str = Field(description="how others read its KV: shared_memory or cuda_ipc; empty without a table")
    fingerprint: str = Field(description="digest of everything that changes KV bytes, 32 hex digits; empty without a table")
    incompatible: dict[str, list[str]] = Field(description="replicas it cannot import from, and what differs")
    groups: list[GroupStats] = Field(description="the model's KV cache groups")
    block_size: int = Field(description="tokens per block")
    blocks: int = Field(description="size of its KV cache")
    cached_blocks: int = Field(description="blocks on offer now")
    in_flight: int = Field(description="requests that this gateway has in flight there")
    load: EngineLoad
    tokens: TokenCounts
    counts: TransferCounts
    peers: list[PeerStats] = Field(description="what it imported, by replica and transport")


class HostMemoryStats(BaseModel):
    """What one replica keeps in host memory of the blocks that left its KV cache. Counts end with the replica host."""

    name: str = Field(description="its name as a source of imports")
    replica: str
    blocks: int = Field(description="slots for blocks")
    stored_blocks: int = Field(description="blocks that can be restored now")
    bytes: int = Field(description="size of the slots on all ranks")
    stores: int = Field(0, description="blocks stored")
    evictions: int = Field(0, description="stored blocks that gave way to others or were flushed")
    ahead_blocks: int = Field(0, description="blocks that began to be stored before they were reallocated")
    dropped_blocks: int = Field(0, description="blocks lost because too many were being stored")
    imports: int = Field(0, description="imports from it, by all replicas that are known")
    import_blocks: int = Field(0, description="blocks restored from it")
    import_bytes: int = Field(0, description="bytes restored from it")
    import_failures: int = Field(0, description="imports from it that fell short")


class TiersBelow(BaseModel):
    """The tiers below host memory: disk and vault."""

    stores: list[StoreStats] = Field([], description="none where neither is set, or their process is not there")
    lost_blocks: int = Field(0, description="blocks that gave way in host memory before they were written")
    unknown_blocks: int = Field(0, description="blocks in host memory that are not what their keys say, and are not written")
    promotions: int = Field(0, description="prompts that something was brought up for, by all gateways")
    promotions_late: int = Field(0, description="prompts for which not all came up in time")
    staged_blocks: int = Field(0, description="blocks brought up into memory that replicas import from")
    import_blocks: int = Field(0, description="blocks that replicas imported of these")
    import_failures: int = Field(0, description="imports of these that fell short")
    asked: PromotionCounts = PromotionCounts()


class Totals(BaseModel):
    """Totals of the fleet, including replicas that are gone."""

    replicas: int
    ready: int
    blocks: int
    cached_blocks: int
    in_flight: int
    tokens: TokenCounts
    counts: TransferCounts


@dataclass(slots=True, kw_only=True)
class ParityStats(ParityCounts):
    """The outcome of the last comparison with an engine, and counts of all comparisons since the gateway's start."""

    replica: Annotated[str, Field(description="the replica that was asked; empty while there is no verdict")]
    completions: KindVerdict
    chat: KindVerdict


@dataclass(slots=True, kw_only=True)
class GatewayStats(RelayCounters):
    """The front door's own counts since its start."""

    version: str
    uptime_seconds: float
    in_flight: Annotated[int, Field(description="requests being served now")] = 0


class KvStats(BaseModel):
    """The body of GET /kv/stats: of one model and its replicas, but for `gateway` and `limits`, which are those of all."""

    model: str
    models: list[str] = Field([], description="all models that have replicas of their own here, each with figures of its own")
    gateway: GatewayStats
    steering: SteeringStats
    costs: CostStats
    ledger: LedgerStats
    tokenizer: TokenizerStats
    parity: ParityStats
    totals: Totals
    replicas: list[ReplicaStats]
    host_memory: list[HostMemoryStats] = Field(description="none where no host memory is set")
    tiers: TiersBelow = TiersBelow()
    queue: QueueStats = Field(QueueStats(), description="all 0 where requests do not wait (replica_requests_max)")
    limits: list[TenantUse] = Field([], description="tenants whose keys have limits")
    shared_limits: SharedLimitStats | None = Field(None, description="null where each gateway counts by itself")
    nodes: list[NodeStats] = Field([], description="other nodes")


def descriptions(shape: type) -> Mapping[str, str]:
    """What the fields of a shape say of themselves, by name."""
    properties = TypeAdapter(shape).json_schema()["properties"]
    return {name: about.get("description", name) for name, about in properties.items()}
