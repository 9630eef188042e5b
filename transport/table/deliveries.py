"""What an engine tells of the requests it served, of its queue, and of the peers it read from."""

import enum
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta
from pydantic import Field


class DeliveryReason(enum.StrEnum):
    """Why a request did not import all of its prompt that this engine lacked. The order is part of the table's version."""

    NONE = "none"
    """Nothing was missed: what could be reused was here, or came."""
    NO_SOURCE_GIVEN = "no_source_given"
    """The gateway asked for no import, or, without a hint, there is no other replica."""
    SOURCE_GONE = "source_gone"
    """The source has no live table any more."""
    SOURCE_HELD_LESS = "source_held_less"
    """The source held fewer of the prompt's blocks, or none, when the engine looked."""
    NOT_EXCHANGING = "not_exchanging"
    """This engine or the source exchanges nothing, or their fingerprints differ."""
    SOURCE_UNREADABLE = "source_unreadable"
    """The source's memory could not be read too often: it is not asked again in its epoch."""
    CHECK_FAILED = "check_failed"
    """Blocks changed while they were copied."""
    COPY_FAILED = "copy_failed"
    """The copy did not end well: the source ended, or its memory did not open."""
    READS_NO_CACHE = "reads_no_cache"
    """The request may not read a cache, or is of a kind that has no keys."""
    ALLOCATION = "allocation"
    """The engine scheduled it without the import that had been planned."""
    LIMITED = "limited"
    """The hint's `tokens` ended the import: the rest is computed on purpose."""


REASONS = tuple(DeliveryReason)
SOURCES_MAX = 3
"""An import has at most so many sources, one behind the other."""
FURTHER_TOKENS_MAX = (1 << 32) - 1


class FromSource(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """So many tokens of a prompt came from `source`."""

    source: str
    tokens: Annotated[int, Meta(ge=0, le=FURTHER_TOKENS_MAX)]


class Delivery(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What became of one request's prompt. Times `*_ns` of events are CLOCK_MONOTONIC, 0 if it never came so far.

    `tag` is the gateway's, 0 if it gave none. `arrived_ns`: handed to the scheduler; `asked_ns`: first looked up;
    `scheduled_ns`: the first step that computes some of it; `first_token_ns`: that the step which computed the prompt's last
    token was done, 0 if the request was aborted before. Tokens are the prompt's, prompt = local + peer + computed once it was
    scheduled. `planned_tokens` is what the last look-up promised, `source` the first that it was to come from, `import_ns` the
    time of the copies alone, added up, `import_wait_ns` from the allocation of its blocks to the first step, or to its end if
    none came. `further` is what of `peer_tokens` came from other sources than the first, in the order of the prompt.

    The order of the fields is part of the table's version.
    """

    tag: int = 0
    arrived_ns: int = 0
    asked_ns: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    prompt_tokens: int = 0
    local_tokens: int = 0
    peer_tokens: int = 0
    computed_tokens: int = 0
    import_ns: int = 0
    import_wait_ns: int = 0
    import_bytes: int = 0
    planned_tokens: int = 0
    stale_blocks: int = 0
    failed_blocks: int = 0
    source: str = ""
    why: DeliveryReason = DeliveryReason.NONE
    further: Annotated[tuple[FromSource, ...], Meta(max_length=SOURCES_MAX - 1)] = ()

    def sources(self) -> tuple[FromSource, ...]:
        """Return where the imported tokens came from, in the order of the prompt; empty if none were."""
        if not self.further:
            return (FromSource(self.source, self.peer_tokens),) if self.peer_tokens else ()
        first = self.peer_tokens - sum(each.tokens for each in self.further)
        return (FromSource(self.source, first), *self.further)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The load of a replica's engine as of its last step; the figures are read one by one, so they may be a step apart."""

    waiting_requests: Annotated[int, Field(description="requests not scheduled yet")] = 0
    running_requests: Annotated[int, Field(description="requests that have blocks, decoding ones included")] = 0
    waiting_tokens: Annotated[int, Field(description="prompt tokens neither computed nor known to be cached")] = 0
    decoding_requests: Annotated[int, Field(description="requests whose prompt is computed")] = 0
    imports_under_way: Annotated[int, Field(description="requests whose blocks are being copied")] = 0
    pinned_blocks: Annotated[int, Field(description="blocks held by pins")] = 0


@dataclass(frozen=True, slots=True)
class PeerCounters:
    """What was imported from one peer since the importer's epoch began.

    Peers beyond the table's room are counted together, as `OTHER_PEERS`.
    """

    name: str
    transport: str
    imports: int
    blocks: int
    bytes: int
    seconds: Annotated[float, Field(description="time of the copies alone")]
    failures: Annotated[int, Field(description="imports that fell short")]


OTHER_PEERS = "(others)"
