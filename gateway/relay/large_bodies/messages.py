"""What the gateway and the process that reads large bodies tell each other: frames of MessagePack, and bytes behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.api.endpoints import Endpoint
from gateway.api.partial_decode import Span
from gateway.prompts.parity import Parity
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.token_ids import TokenIds

LENGTH_BYTES = 4
"""Before each frame, its length, little-endian."""


class Setup(msgspec.Struct):
    """The first frame: which tokenizers, and how much is remembered of what each did.

    `sources` are each a TokenizerSource's fields, one for each fleet.
    """

    sources: list[dict[str, Any]]
    cache_bytes_max: int
    texts_bytes_max: int
    memory_bytes_max: int


class OfFleet(msgspec.Struct):
    """What is known by now of one fleet's token ids and its longest prompt, and the names of its models if there are others."""

    completions: Parity
    chat: Parity
    context_tokens: int | None
    names: list[str] = []


class Job(msgspec.Struct):
    """A body of `size` bytes, which follow, for one of the `fleets`: the one with its model, or the first.

    It is from a `tenant`, named by its salt, of so many `tenants`.
    """

    endpoint: Endpoint
    tenant: str
    tenants: int
    size: int
    fleets: list[OfFleet]


class Refusal(msgspec.Struct, tag=True, tag_field="kind"):
    """The client's error."""

    message: str
    status: int
    type: str
    code: str | None
    param: str | None
    headers: dict[str, str]


class Reading(msgspec.Struct, tag=True, tag_field="kind"):
    """What is known of a body. Of each prompt the ids follow, and the ids in decimals, of as many bytes as `ids` says.

    `steering` is the place of those that the request is steered by.

    `fleet` is the place of the one that it was read for, `fields` are those that the planner looks at, `span` is where the
    prompt's value is in the body. The rest as in KnownPrompt.
    """

    fleet: int
    fields: dict[str, Any]
    span: Span
    ids: list[int]
    steering: int | None
    sent: str
    certain: bool
    cacheable: bool
    count: int
    tokens: int
    why_unknown: str
    chat_ids: bool

    @classmethod
    def of(cls, fleet: int, fields: dict[str, Any], span: Span, known: KnownPrompt) -> tuple[Reading, list[bytes]]:
        """The frame and what follows it."""
        sent, kind = [], "nothing"
        if isinstance(known.sent, TokenIds):
            sent, kind = [known.sent], "one"
        elif known.sent is not None:
            sent, kind = list(known.sent), "list"
        place = None
        if known.ids is not None:
            place = next((at for at, ids in enumerate(sent) if ids is known.ids), len(sent))
            sent += [known.ids] * (place == len(sent))
        parts = [part for ids in sent for part in (ids.raw, ids.text)]
        lengths = list(map(len, parts))
        told = (known.certain, known.cacheable, known.count, known.tokens, known.why_unknown, known.chat_ids)
        return cls(fleet, fields, span, lengths, place, kind, *told), parts

    def known(self, parts: Sequence[bytes]) -> KnownPrompt:
        """The prompt again, of what followed the frame."""
        prompts = [TokenIds(raw, text=text) for raw, text in zip(parts[::2], parts[1::2], strict=True)]
        ids = None if self.steering is None else prompts[self.steering]
        sent: Sequence[Any] | None = None if self.sent == "nothing" else prompts[0] if self.sent == "one" else prompts
        told = (self.certain, self.cacheable, self.count, self.tokens, self.why_unknown, self.chat_ids)
        return KnownPrompt(ids, sent, *told)
