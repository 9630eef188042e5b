"""The parts of GET /kv/stats that the ledger, the engines' load and their imports by peer fill."""

from collections.abc import Iterable
from dataclasses import asdict

from pydantic import BaseModel, Field

from gateway.ledger import Ledger
from gateway.losses import LossReason
from transport.deliveries import EngineLoad, PeerCounters


class LedgerStats(BaseModel):
    """Attempts to serve requests that are over, retries included, and the prompt tokens that they lost to each reason."""

    kept: int = Field(0, description="attempts that /kv/explain can tell of")
    settled: int = Field(0, description="attempts that are over and judged")
    prompt_tokens: int = Field(0, description="tokens of their prompts whose ids were known")
    predicted_tokens: int = Field(0, description="of these, expected from a cache")
    best_available_tokens: int = Field(0, description="of these, held by the replica that held most")
    local_tokens: int = Field(0, description="delivered from the replica's own cache")
    peer_tokens: int = Field(0, description="delivered from another replica")
    computed_tokens: int = Field(0, description="computed")
    unmatched_deliveries: int = Field(0, description="engines' records of requests that are not in the ledger")
    missed_deliveries: int = Field(0, description="engines' records that were overwritten before they were read")
    dropped: int = Field(0, description="attempts forgotten before they were over: the ledger is too small")
    requests: dict[str, int] = Field(default_factory=dict, description="attempts by the reason of their loss")
    lost_tokens: dict[str, int] = Field(default_factory=dict, description="tokens computed though they had been, by reason")


class LoadStats(BaseModel):
    """What a replica's engine has to do, as of its last step."""

    waiting_requests: int = Field(0, description="requests of which nothing was scheduled yet")
    running_requests: int = Field(0, description="requests being computed")
    waiting_tokens: int = Field(0, description="prompt tokens that are neither computed nor known to be cached")
    decoding_requests: int = Field(0, description="requests whose prompt is computed")
    imports_under_way: int = Field(0, description="requests whose blocks are being copied")
    pinned_blocks: int = Field(0, description="blocks that a pin keeps")


class PeerStats(BaseModel):
    """What a replica imported from one other."""

    name: str
    transport: str
    imports: int
    blocks: int
    bytes: int
    seconds: float = Field(description="time of the copies alone")
    failures: int = Field(description="imports that fell short")
    gigabytes_per_second: float = Field(description="bytes over the time of the copies, 1e9 bytes; 0 without any")


def ledger_stats(ledger: Ledger, missed_deliveries: int) -> LedgerStats:
    """The ledger's sums, every reason among them."""
    sums = ledger.sums
    same = {name: getattr(sums, name) for name in LedgerStats.model_fields if hasattr(sums, name)}
    return LedgerStats(
        kept=len(ledger),
        missed_deliveries=missed_deliveries,
        requests={reason.value: sums.requests_by_reason[reason] for reason in LossReason},
        lost_tokens={reason.value: sums.lost_tokens_by_reason[reason] for reason in LossReason},
        **same,
    )


def load_stats(load: EngineLoad) -> LoadStats:
    """An engine's load as it is shown."""
    return LoadStats(**asdict(load))


def peer_stats(peers: Iterable[PeerCounters]) -> list[PeerStats]:
    """What was imported by peer, with the rate that comes of it."""
    return [
        PeerStats(
            name=peer.name,
            transport=peer.transport,
            imports=peer.imports,
            blocks=peer.blocks,
            bytes=peer.bytes,
            seconds=peer.nanoseconds / 1e9,
            failures=peer.failures,
            gigabytes_per_second=peer.bytes / peer.nanoseconds if peer.nanoseconds else 0.0,
        )
        for peer in peers
    ]
