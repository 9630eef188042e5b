"""A plan: where a request goes, what is put into its body, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.fleet import Replica
from gateway.prompts.reader import KnownPrompt
from gateway.steering.in_flight import Flight
from gateway.steering.steer import Decision


class Asked(msgspec.Struct, frozen=True, gc=False, eq=False):
    """What of a request outlives its first plan."""

    known: KnownPrompt
    salt: str = ""
    lora: str = ""
    affinity: str = ""
    pinned: str | None = None
    streamed: bool = False
    embeds: bool = False


class Plan(msgspec.Struct, frozen=True, eq=False):
    """Where a request goes. `prompt` (token ids in place of text), `kv_transfer_params` and `cache_salt` go into its body.

    `predicted_tokens` of `prompt_tokens` are expected out of a cache, the replica's own or the source's; `held_tokens_max` were
    in the cache that held most of it. `tag` comes back with
    what the engine says of it.
    """

    replica: Replica
    decision: Decision
    tag: int
    prompt: Sequence[Any] | None
    kv_transfer_params: dict[str, Any] | None
    cache_salt: str | None
    prompt_tokens: int
    predicted_tokens: int
    held_tokens_max: int
    flight: Flight
    asked: Asked

    @property
    def reason(self) -> str:
        """The decision in words."""
        known = self.asked.known
        return self.decision.reason if known.ids is not None else f"{self.decision.reason} ({known.why_unknown})"

    @property
    def source(self) -> str | None:
        """The replica to import from."""
        return self.decision.source

    @property
    def salt(self) -> str:
        return self.asked.salt

    @property
    def pinned(self) -> str | None:
        """The replica that the request named."""
        return self.asked.pinned


@dataclass(slots=True)
class SteeringCounts:
    """Decisions since the start, by the names that /kv/stats shows."""

    planned: int = 0
    without_ids: int = 0
    to_holder: int = 0
    with_source: int = 0
    pinned: int = 0
    prompt_tokens: int = 0
    predicted_tokens: int = 0

    def count(self, plan: Plan) -> None:
        """Count a decision."""
        asked, cached = plan.asked, plan.predicted_tokens
        self.planned += 1
        if plan.decision.source is not None:
            self.with_source += 1
        elif cached > 0 and asked.pinned is None:
            self.to_holder += 1
        if asked.pinned is not None:
            self.pinned += 1
        if asked.known.ids is None:
            self.without_ids += 1
        self.prompt_tokens += plan.prompt_tokens
        self.predicted_tokens += cached
