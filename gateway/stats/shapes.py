"""The shapes of GET /kv/stats, as far as they are not those of what is counted."""

from pydantic import BaseModel, Field

from gateway.planner.plan import SteeringStats
from gateway.prompts.tokenizer.service import TokenizerStats
from gateway.steering.costs.model import CostStats
from gateway.steering.outliers import OutlierState


class LedgerStats(BaseModel):
    """Finished attempts to serve requests, including retries, and the prompt tokens lost to each reason."""

    kept: int = Field(0, description="attempts that /kv/explain knows")
    settled: int = Field(0, description="attempts that are finished and judged")
    prompt_tokens: int = Field(0, description="tokens of their prompts, if the token ids were known")
    predicted_tokens: int = Field(0, description="of these, expected from a cache")
    best_available_tokens: int = Field(0, description="of these, held by the replica that held most")
    local_tokens: int = Field(0, description="delivered from the replica's own cache")
    peer_tokens: int = Field(0, description="delivered from another replica")
    computed_tokens: int = Field(0, description="computed")
    unmatched_deliveries: int = Field(0, description="engines' records of requests that are not in the ledger")
    missed_deliveries: int = Field(0, description="engines' records that were overwritten before they were read")
    dropped: int = Field(0, description="attempts forgotten before they were finished: the ledger is too small")
    requests: dict[str, int] = Field(default_factory=dict, description="attempts by the reason for the miss")
    lost_tokens: dict[str, int] = Field(
        default_factory=dict, description="tokens computed although they had been computed before, by reason"
    )


class LoadStats(BaseModel):
    """The load of a replica's engine as of its last step."""

    waiting_requests: int = Field(0, description="requests not scheduled yet")
    running_requests: int = Field(0, description="requests whose prompt is being computed")
    waiting_tokens: int = Field(0, description="prompt tokens neither computed nor known to be cached")
    decoding_requests: int = Field(0, description="requests whose prompt is computed")
    imports_under_way: int = Field(0, description="requests whose blocks are being copied")
    pinned_blocks: int = Field(0, description="blocks held by pins")


class PeerStats(BaseModel):
    """What a replica imported from one other replica."""

    name: str
    transport: str
    imports: int
    blocks: int
    bytes: int
    seconds: float = Field(description="time of the copies alone")
    failures: int = Field(description="imports that fell short")
    gigabytes_per_second: float = Field(description="1e9 bytes per second of copying; 0 without imports")


class TokenCounts(BaseModel):
    """Prompt tokens by where their KV came from. `prompt` is the sum of the others, each prompt counted once."""

    prompt: int = Field(0, description="prompt tokens scheduled")
    local: int = Field(0, description="from the replica's own prefix cache")
    peer_shared_memory: int = Field(0, description="from another replica, through shared memory")
    peer_cuda_ipc: int = Field(0, description="from another replica, through CUDA IPC")
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
    table_errors: int = Field(0, description="other replicas' tables that could not be used")
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
    load: LoadStats
    tokens: TokenCounts
    counts: TransferCounts
    peers: list[PeerStats] = Field(description="what it imported, by replica and transport")


class Totals(BaseModel):
    """Totals of the fleet, including replicas that are gone."""

    replicas: int
    ready: int
    blocks: int
    cached_blocks: int
    in_flight: int
    tokens: TokenCounts
    counts: TransferCounts


class KindParity(BaseModel):
    """Whether our token ids are the engine's, for one kind of request."""

    parity: str = Field(description="unknown, exact, degraded or off")
    compared: int
    differences: list[str] = Field(description="canaries that differ, and where")
    reason: str


class ParityStats(BaseModel):
    """The outcome of the last comparison with an engine, and counts of all comparisons since the gateway's start."""

    replica: str = Field(description="the replica that was asked; empty while there is no verdict")
    checks: int = Field(0, description="comparisons begun")
    failures: int = Field(0, description="of these, comparisons without an answer from the engine")
    changes: int = Field(0, description="comparisons whose verdict differed from the previous one")
    differences_found: int = Field(0, description="canaries whose ids differed, over all comparisons")
    completions: KindParity
    chat: KindParity


class GatewayStats(BaseModel):
    """The front door's own counts since its start."""

    version: str
    uptime_seconds: float
    in_flight: int = Field(0, description="requests being served now")
    requests: int = Field(0, description="requests taken")
    refused: int = Field(0, description="answered with an error that the client can fix, status below 500")
    retries: int = Field(0, description="requests sent again to another replica")
    replicas_lost: int = Field(0, description="connections to replicas that failed or broke")
    streams_broken: int = Field(0, description="event streams that ended with an error")
    clients_left: int = Field(0, description="requests whose client left")
    internal_errors: int = Field(0, description="defects of the gateway")


class KvStats(BaseModel):
    """The body of GET /kv/stats."""

    model: str
    gateway: GatewayStats
    steering: SteeringStats
    costs: CostStats
    ledger: LedgerStats
    tokenizer: TokenizerStats
    parity: ParityStats
    totals: Totals
    replicas: list[ReplicaStats]
