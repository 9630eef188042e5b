"""A plan: where a request goes, what is put into its body, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from pydantic import Field

from engine.fleet import Replica
from gateway.planner.promotions import Promotion
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.steering.in_flight import Flight
from gateway.steering.steer import Decision
from gateway.token_ids import TokenIds


class PlanningRequest(msgspec.Struct, frozen=True, gc=False, eq=False):
    """What planning needs to know of a request, also for another attempt. `wanted_replica` is the one that it names.

    `hinted` and `salted` tell whether its endpoint has fields for a hint and for a salt, `stepless` that the engine makes no
    step for it, `promotion` what disk and vault were asked for it.
    """

    known: KnownPrompt
    salt: str = ""
    lora: str = ""
    affinity: str = ""
    wanted_replica: str | None = None
    streamed: bool = False
    hinted: bool = True
    salted: bool = True
    stepless: bool = False
    promotion: Promotion | None = None


class Plan(msgspec.Struct, frozen=True, eq=False):
    """Where a request goes. `prompt` (token ids in place of text), `kv_transfer_params` and `cache_salt` go into its body.

    `predicted_tokens` of `prompt_tokens` are expected out of a cache, the replica's own or the source's; `held_tokens_max` were
    in the cache that held most of it, about `formerly_tokens` were asked for before: 0 if that is not more than is at hand.
    `flushed`: caches were emptied on request since then.
    `tag` comes back with what the engine says of it.
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
    formerly_tokens: int
    flight: Flight
    request: PlanningRequest
    flushed: bool = False

    @property
    def reason(self) -> str:
        """The decision in words."""
        known = self.request.known
        return self.decision.reason if known.ids is not None else f"{self.decision.reason} ({known.why_unknown})"

    @property
    def held_bytes(self) -> int:
        """What the prompt's ids take at most, beside the client's body."""
        known = self.request.known
        if known.ids is None:
            return 0
        if type(known.sent) is not list:
            return known.ids.held_bytes
        others = [ids for ids in known.sent if type(ids) is TokenIds and ids is not known.ids]
        return known.ids.held_bytes + sum([ids.held_bytes for ids in others])

    @property
    def source(self) -> str | None:
        """The replica to import from."""
        return self.decision.source

    @property
    def salt(self) -> str:
        return self.request.salt


@dataclass(slots=True)
class SteeringStats:
    """What steering decided since the gateway's start, retries included."""

    planned: Annotated[int, Field(description="requests steered")] = 0
    without_ids: Annotated[
        int, Field(description="of these, requests whose token ids were not known: steered by load alone")
    ] = 0
    to_holder: Annotated[int, Field(description="sent to a replica that holds their longest prefix")] = 0
    with_source: Annotated[int, Field(description="sent elsewhere, with a replica to import from")] = 0
    pinned: Annotated[
        int, Field(description="sent to the replica that the request named (x-peerkv-replica); unrelated to pinned prefixes")
    ] = 0
    prompt_tokens: Annotated[int, Field(description="tokens of all prompts with known ids")] = 0
    predicted_tokens: Annotated[int, Field(description="of these, tokens expected from a cache, own or imported")] = 0

    def count(self, plan: Plan) -> None:
        """Count a decision."""
        request, cached = plan.request, plan.predicted_tokens
        self.planned += 1
        if plan.decision.source is not None:
            self.with_source += 1
        elif cached > 0 and request.wanted_replica is None:
            self.to_holder += 1
        if request.wanted_replica is not None:
            self.pinned += 1
        if request.known.ids is None:
            self.without_ids += 1
        self.prompt_tokens += plan.prompt_tokens
        self.predicted_tokens += cached
