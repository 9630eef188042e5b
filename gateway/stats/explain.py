"""The body of GET /kv/explain/{request_id}: what was decided for a request, what happened to it, and why not more."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, Field

from gateway.block_registry.tables import Table
from gateway.ledger import attempts
from gateway.ledger.judging import judge
from gateway.ledger.misses import MissReason
from gateway.planner.promotions import Promotion
from gateway.stats.shapes import GroupStats, group_stats
from gateway.steering.choices import Option
from transport.table.deliveries import Delivery

_NS = 1e-9
_ANSWER_IDS = ("chatcmpl-", "cmpl-", "embd-", "score-", "pooling-")
"""How vLLM begins the id in an answer's body, before the request's; a Responses answer has another id."""
ID_CHARS_MAX = 128 + max(map(len, _ANSWER_IDS))


def request_id_of(given: str) -> str:
    """The request id in the id of an answer's body; any other id as it is."""
    return next((given.removeprefix(prefix) for prefix in _ANSWER_IDS if given.startswith(prefix)), given)


class OptionConsidered(BaseModel):
    """A way to serve the request that steering weighed."""

    replica: str
    source: str = Field(description="replica to import from; empty if none")
    action: str = Field(description="hit, pull, split or recompute")
    seconds: float = Field(description="expected seconds to the first token")


class Promoted(BaseModel):
    """What disk and vault brought up before the request was planned."""

    source: str = Field(description="the table that it came into, named after the disk or the vault; empty if nothing came")
    tokens: int = Field(description="up to where the prompt was there then")
    seconds: float = Field(description="how long the request waited for it")
    why: str = Field(description="why nothing came, in words")


class Expected(BaseModel):
    """What steering expected."""

    local_tokens: int = Field(description="prompt tokens from the replica's own cache")
    peer_tokens: int = Field(description="imported from the source")
    computed_tokens: int = Field(description="computed")
    best_available_tokens: int = Field(description="the longest prefix that any replica held")
    queue_seconds: float
    transfer_seconds: float
    prefill_seconds: float
    first_token_seconds: float = Field(description="their sum")


class ImportedFrom(BaseModel):
    """What of a prompt came from one source."""

    source: str
    tokens: int


class Delivered(BaseModel):
    """What the engine did with one prompt of the request."""

    prompt_tokens: int
    local_tokens: int
    peer_tokens: int
    computed_tokens: int
    source: str = Field(description="replica that blocks were imported from, of several the first; empty if none")
    sources: list[ImportedFrom] = Field(
        description="all replicas and tiers that blocks were imported from, in the order of the prompt"
    )
    why: str = Field(description="why the import did not deliver everything that was missing, in the engine's words")
    planned_tokens: int = Field(description="tokens that the sources held when the engine looked")
    stale_blocks: int = Field(description="blocks that changed while they were copied")
    failed_blocks: int = Field(description="blocks that were computed because their import failed")
    import_bytes: int
    import_seconds: float = Field(description="seconds of the copies alone, added up")
    import_wait_seconds: float = Field(
        description="seconds from the allocation of its blocks to the first step after the import"
    )
    queue_seconds: float | None = Field(
        description="seconds from its arrival in the engine to its first step; null if there was none"
    )
    first_token_seconds: float | None = Field(description="seconds from its arrival in the engine; null if there was none")


class Attempt(BaseModel):
    """One attempt to serve the request; losing a replica leads to another."""

    time: float = Field(description="when it was sent, Unix time in seconds")
    endpoint: str
    tenant: str
    model: str = Field(description="as the client named it; empty for the served one")
    replica: str
    source: str = Field(description="replica that it was told to import from; empty if none")
    action: str = Field(description="hit, pull, split or recompute")
    why: str = Field(description="why this replica and this source, in words")
    pinned: bool = Field(False, description="whether the caller chose the replica (x-peerkv-replica)")
    prompt_tokens: int = Field(description="0 when the token ids were not known")
    expected: Expected
    options: list[OptionConsidered]
    promoted: Promoted | None = Field(None, description="null if disk and vault were not asked")
    delivered: list[Delivered] = Field(description="one per prompt and choice; empty until something is known")
    status: int | None = Field(description="HTTP status; null while it runs, 0 without an answer, 499 if the client left")
    first_byte_seconds: float | None = Field(description="from sending to the answer's first byte")
    ended_seconds: float | None = Field(description="from sending to the end")
    settled: bool = Field(description="whether `reason` is final")
    reason: str = Field(description="why less was delivered than possible: " + ", ".join(MissReason))
    reason_in_words: str
    lost_tokens: int = Field(description="prompt tokens computed although they had been computed before")
    groups: list[GroupStats] = Field(description="the replica's KV cache groups now, and what they make an import cost")


class Explanation(BaseModel):
    """The attempts under one request id, oldest first."""

    request_id: str
    attempts: list[Attempt]


def explain(request_id: str, kept: Sequence[attempts.Attempt], tables: Mapping[str, Table]) -> Explanation:
    """Describe the recorded attempts of a request; `tables` are the replicas' block tables by name."""
    return Explanation(request_id=request_id, attempts=[_attempt(each, tables.get(each.replica)) for each in kept])


def _attempt(kept: attempts.Attempt, table: Table | None) -> Attempt:
    miss = kept.miss or judge(kept)
    known = kept.settled or bool(kept.deliveries)
    return Attempt(
        time=kept.at,
        endpoint=kept.info.endpoint,
        tenant=kept.info.tenant,
        model=kept.info.model,
        replica=kept.replica,
        source=kept.source,
        action=kept.action,
        why=kept.reason,
        pinned=kept.pinned,
        prompt_tokens=kept.prompt_tokens,
        expected=_expected(kept),
        options=[_option(option) for option in kept.options],
        promoted=_promoted(kept.promotion),
        delivered=[_delivered(delivery) for delivery in kept.deliveries],
        status=kept.status,
        first_byte_seconds=kept.first_byte_seconds,
        ended_seconds=kept.ended_seconds,
        settled=kept.settled,
        reason=miss.reason if known else MissReason.UNKNOWN,
        reason_in_words=miss.words if known else "nothing is known of it yet",
        lost_tokens=miss.tokens if known else 0,
        groups=group_stats(table.groups if table is not None else ()),
    )


def _expected(kept: attempts.Attempt) -> Expected:
    expected = kept.decision.expected
    return Expected(
        local_tokens=kept.local_tokens,
        peer_tokens=kept.peer_tokens,
        computed_tokens=max(0, kept.prompt_tokens - kept.local_tokens - kept.peer_tokens),
        best_available_tokens=kept.best_available_tokens,
        queue_seconds=expected.queue_seconds,
        transfer_seconds=expected.transfer_seconds,
        prefill_seconds=expected.prefill_seconds,
        first_token_seconds=expected.seconds,
    )


def _promoted(promotion: Promotion | None) -> Promoted | None:
    if promotion is None:
        return None
    return Promoted(source=promotion.source, tokens=promotion.tokens, seconds=promotion.seconds, why=promotion.why)


def _option(option: Option) -> OptionConsidered:
    return OptionConsidered(replica=option.replica, source=option.source or "", action=option.action, seconds=option.seconds)


def _delivered(delivery: Delivery) -> Delivered:
    return Delivered(
        prompt_tokens=delivery.prompt_tokens,
        local_tokens=delivery.local_tokens,
        peer_tokens=delivery.peer_tokens,
        computed_tokens=delivery.computed_tokens,
        source=delivery.source,
        sources=[ImportedFrom(source=each.source, tokens=each.tokens) for each in delivery.sources()],
        why=delivery.why,
        planned_tokens=delivery.planned_tokens,
        stale_blocks=delivery.stale_blocks,
        failed_blocks=delivery.failed_blocks,
        import_bytes=delivery.import_bytes,
        import_seconds=delivery.import_ns * _NS,
        import_wait_seconds=delivery.import_wait_ns * _NS,
        queue_seconds=_since(delivery.arrived_ns, delivery.scheduled_ns),
        first_token_seconds=_since(delivery.arrived_ns, delivery.first_token_ns),
    )


def _since(start_ns: int, end_ns: int) -> float | None:
    return (end_ns - start_ns) * _NS if end_ns else None
