"""The body of GET /kv/stats: each replica's share in serving prompts from caches, and the fleet's."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from pydantic import BaseModel, Field

from engine.fleet import FleetView, Replica, ReplicaState
from gateway import __version__
from gateway.cost_stats import CostStats, cost_stats
from gateway.counters import CounterLedger
from gateway.ledger_stats import LedgerStats, LoadStats, PeerStats, ledger_stats, load_stats, peer_stats
from gateway.parity import KindVerdict, ParityCounts, ParityVerdict
from gateway.planner import Planner
from gateway.recorder import Recorder
from gateway.registry import obstacles
from gateway.tables import Table
from gateway.tokens import TokenService
from transport.deliveries import EngineLoad


class TokenCounts(BaseModel):
    """Prompt tokens by where their KV came from. `prompt` is the sum of the others, each prompt counted once."""

    prompt: int = Field(0, description="prompt tokens scheduled")
    local: int = Field(0, description="from the replica's own prefix cache")
    peer_shared_memory: int = Field(0, description="from another replica, through shared memory")
    peer_cuda_ipc: int = Field(0, description="from another replica, through CUDA IPC")
    computed: int = Field(0, description="computed")

    def by_source(self) -> dict[str, int]:
        """The parts by name, without their sum."""
        return {name: count for name, count in self.model_dump().items() if name != "prompt"}


class TransferCounts(BaseModel):
    """What was imported and what was not."""

    requests: int = Field(0, description="requests scheduled")
    imports: int = Field(0, description="imports from another replica")
    import_blocks: int = Field(0, description="blocks imported")
    import_bytes: int = Field(0, description="bytes imported")
    import_seconds: float = Field(0.0, description="time spent in imports, seconds")
    check_failures: int = Field(0, description="blocks that changed while they were copied, and were computed instead")
    fallbacks: int = Field(0, description="requests whose import failed and that computed instead")
    published_blocks: int = Field(0, description="blocks offered to other replicas")
    evictions: int = Field(0, description="offered blocks that were reallocated")
    peers_incompatible: int = Field(0, description="other replicas' tables refused for what differs")
    table_errors: int = Field(0, description="other replicas' tables that could not be used")
    pins: int = Field(0, description="prefixes that were pinned")
    pins_refused: int = Field(0, description="pins that were asked for and not to be had")
    hints_malformed: int = Field(0, description="fields of hints that were ignored")


class ReplicaStats(BaseModel):
    """One replica. Counts are over all its lives since the gateway started watching."""

    name: str
    state: str = Field(description="starting, ready, draining, backoff, failed or stopped")
    reason: str = Field(description="why it is not ready, in words")
    device: str
    restarts: int
    epochs: int = Field(description="lives seen by this gateway")
    exchanges: str = Field(description='"ok", or why it exchanges no KV')
    transport: str = Field(description="how others read its KV: shared_memory, cuda_ipc, or empty without a table")
    fingerprint: str = Field(description="digest of all that changes KV bytes, 32 hex digits; empty without a table")
    incompatible: dict[str, list[str]] = Field(description="replicas it can not import from, and what differs")
    block_size: int = Field(description="tokens a block")
    blocks: int = Field(description="size of its KV cache")
    cached_blocks: int = Field(description="blocks on offer now")
    in_flight: int = Field(description="requests that this gateway has with it")
    load: LoadStats
    tokens: TokenCounts
    counts: TransferCounts
    peers: list[PeerStats] = Field(description="what it imported, by replica and transport")


class Totals(BaseModel):
    """The fleet in all, replicas that are gone included."""

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
    failures: int = Field(0, description="of these, comparisons that the engine did not answer")
    changes: int = Field(0, description="comparisons that came to another verdict than the one before")
    differences_found: int = Field(0, description="canaries whose ids differed, over all comparisons")
    completions: KindParity
    chat: KindParity


class TokenizerStats(BaseModel):
    """Whether prompts are tokenised in the gateway."""

    loaded: bool
    chat: bool
    directory: str
    reason: str
    chat_reason: str


class GatewayStats(BaseModel):
    """The front door's own counts since its start."""

    version: str
    uptime_seconds: float
    in_flight: int = Field(0, description="requests being served now")
    requests: int = Field(0, description="requests taken")
    refused: int = Field(0, description="answered with an error that the client can mend, status below 500")
    retries: int = Field(0, description="requests sent again, to another replica")
    replicas_lost: int = Field(0, description="connections to replicas that failed or broke")
    streams_broken: int = Field(0, description="event streams that ended with an error")
    clients_left: int = Field(0, description="requests whose client left")
    internal_errors: int = Field(0, description="defects of the gateway")


class SteeringStats(BaseModel):
    """What steering decided since the gateway's start, retries included."""

    planned: int = Field(0, description="requests steered")
    without_ids: int = Field(0, description="of these, requests whose token ids were not known: steered by load alone")
    to_holder: int = Field(0, description="sent to a replica that holds their longest prefix")
    with_source: int = Field(0, description="sent elsewhere, with a replica to import from")
    pinned: int = Field(0, description="sent where the request said")
    prompt_tokens: int = Field(0, description="tokens of all prompts whose ids were known")
    predicted_tokens: int = Field(0, description="of these, tokens expected from a cache, own or imported")


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


class StatsView:
    """Puts the snapshot together.

    `door` gives the front door's counts by the names in GatewayStats; what it leaves out is 0.
    """

    def __init__(
        self,
        fleet: FleetView,
        planner: Planner,
        tokens: TokenService,
        recorder: Recorder,
        door: Callable[[], Mapping[str, int]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._planner = planner
        self._tokens = tokens
        self._recorder = recorder
        self._door = door
        self._clock = clock
        self._started = clock()

    def snapshot(self) -> KvStats:
        """Return the state of everything now."""
        fleet = self._fleet.snapshot()
        self._recorder.catch_up()
        tables = self._planner.registry.tables()
        ledger = self._planner.registry.ledger
        in_flight = self._planner.in_flight()
        replicas = [_replica_stats(replica, tables, ledger, in_flight.get(replica.name, 0)) for replica in fleet.replicas]
        return KvStats(
            model=fleet.served_model_name or fleet.model,
            gateway=self._gateway(),
            steering=SteeringStats(**asdict(self._planner.counts)),
            costs=cost_stats(self._planner.costs.report()),
            ledger=ledger_stats(self._recorder.ledger, self._recorder.feed.missed),
            tokenizer=TokenizerStats(**asdict(self._tokens.state)),
            parity=_parity_stats(self._planner.parity, self._planner.parity_counts),
            totals=_totals(replicas, ledger),
            replicas=replicas,
        )

    def _gateway(self) -> GatewayStats:
        uptime = self._clock() - self._started
        known = {name: count for name, count in self._door().items() if name in GatewayStats.model_fields}
        return GatewayStats.model_validate({"version": __version__, "uptime_seconds": uptime, **known})


def token_counts(counters: Mapping[str, int]) -> TokenCounts:
    """The tokens among a table's counters."""
    return TokenCounts(
        prompt=counters.get("prompt_tokens", 0),
        local=counters.get("local_tokens", 0),
        peer_shared_memory=counters.get("peer_tokens_shared_memory", 0),
        peer_cuda_ipc=counters.get("peer_tokens_cuda_ipc", 0),
        computed=counters.get("computed_tokens", 0),
    )


def transfer_counts(counters: Mapping[str, int]) -> TransferCounts:
    """The rest of a table's counters."""
    seconds = counters.get("import_nanoseconds", 0) / 1e9
    same = {name: counters.get(name, 0) for name in TransferCounts.model_fields if name != "import_seconds"}
    return TransferCounts(import_seconds=seconds, **same)


def _replica_stats(replica: Replica, tables: Mapping[str, Table], ledger: CounterLedger, in_flight: int) -> ReplicaStats:
    table = tables.get(replica.name)
    counters = ledger.counters(replica.name)
    others = {name: obstacles(table, other) for name, other in tables.items() if name != replica.name} if table else {}
    return ReplicaStats(
        name=replica.name,
        state=replica.state.value,
        reason=replica.reason,
        device=replica.device,
        restarts=replica.restarts,
        epochs=ledger.epochs(replica.name),
        exchanges=table.status if table else "it has no block table",
        transport=table.transport if table else "",
        fingerprint=table.fingerprint.hex() if table else "",
        incompatible={name: list(found) for name, found in others.items() if found},
        block_size=table.block_size if table else 0,
        blocks=table.num_blocks if table else 0,
        cached_blocks=table.cached_blocks() if table else 0,
        in_flight=in_flight,
        load=load_stats(table.load() if table else EngineLoad()),
        tokens=token_counts(counters),
        counts=transfer_counts(counters),
        peers=peer_stats(ledger.peers(replica.name)),
    )


def _totals(replicas: list[ReplicaStats], ledger: CounterLedger) -> Totals:
    summed: dict[str, int] = {}
    for name in ledger.names():
        for counter, count in ledger.counters(name).items():
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


def _parity_stats(verdict: ParityVerdict, counts: ParityCounts) -> ParityStats:
    return ParityStats(
        replica=verdict.replica,
        checks=counts.checks,
        failures=counts.failures,
        changes=counts.changes,
        differences_found=counts.differences,
        completions=_kind(verdict.completions),
        chat=_kind(verdict.chat),
    )


def _kind(verdict: KindVerdict) -> KindParity:
    return KindParity(
        parity=verdict.parity.value,
        compared=verdict.compared,
        differences=list(verdict.differences),
        reason=verdict.reason,
    )
