"""What the relay asks of the planner and of the ledger: the seam between relaying and steering."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, Protocol, TypeVar

from engine.fleet import Replica
from gateway.api.endpoints import Endpoint
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.limits.request_size import PromptSize
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.tenants.tenants import TenantContext


class Plan(Protocol):
    """Where a request goes and what is put into its body. Fields that are None leave the body as it is."""

    @property
    def replica(self) -> Replica: ...
    @property
    def prompt(self) -> Sequence[Any] | None:
        """Token ids to send in place of the completion's text."""
        ...

    @property
    def kv_transfer_params(self) -> dict[str, Any] | None: ...
    @property
    def cache_salt(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int:
        """Of a prompt whose ids are known, else 0."""
        ...

    @property
    def held_bytes(self) -> int:
        """Held beside the body as long as the request is under way."""
        ...


PlanT = TypeVar("PlanT", bound=Plan)


class PlannerLike(Protocol[PlanT]):
    """Decides which replica gets a request."""

    async def read(
        self,
        endpoint: Endpoint,
        body: dict[str, Any],
        tenant: TenantContext,
        *,
        wanted_replica: str | None,
        known: KnownPrompt | None = None,
    ) -> Any:
        """What `decide` needs; `known` is the prompt if it was read before.

        Raises ApiError: NoReplicaReady, PromptTooLong, UnknownReplica, ReplicaNotReady.
        """
        ...

    def prompt_size(self, request: Any) -> PromptSize:
        """How long the prompts of what was read are, at most."""
        ...

    def uncached_tokens(self, request: Any) -> int:
        """How many tokens of what was read nobody holds."""
        ...

    def decide(self, request: Any) -> PlanT:
        """A plan for what was read. Raises ApiError: NoReplicaReady, UnknownReplica, ReplicaNotReady."""
        ...

    def replan(self, plan: PlanT, *, exclude: Set[str]) -> PlanT:
        """Another plan for the same request, on none of the excluded replicas. Raises NoReplicaReady."""
        ...

    def knows_prompt(self, plan: PlanT) -> bool:
        """Whether the ids of the plan's prompt are known to be the engine's."""
        ...

    def go_on(
        self, plan: PlanT, output: Sequence[int], *, chat: bool, prompt: Sequence[int] | None, exclude: Set[str]
    ) -> PlanT | None:
        """A plan to go on behind the `output` of the plan's replica; `prompt` are its prompt's ids, None if they are known.

        None if that cannot be asked of an engine. Raises NoReplicaReady.
        """
        ...


PlanT_contra = TypeVar("PlanT_contra", bound=Plan, contravariant=True)


class AttemptRecorder(Protocol[PlanT_contra]):
    """Hears of each attempt to serve a request, in the order of these methods, on the event loop's thread."""

    def begin(self, plan: PlanT_contra, info: RequestInfo) -> Attempt:
        """The request is about to be sent to the plan's replica, without an await after the plan was made."""
        ...

    def first_byte(self, attempt: Attempt) -> bytes:
        """The replica's answer begins, or is complete. Returns the value of x-peerkv-cache, empty if unknown."""
        ...

    def stream_begins(self, attempt: Attempt) -> bytes:
        """As `first_byte`, of an answer that is streamed: the replica has not failed."""
        ...

    def was_borne(self, attempt: Attempt) -> bool:
        """Whether the engine is known to have computed the prompt; to be asked before `ended`."""
        ...

    def ended(self, attempt: Attempt, status: int) -> None:
        """The attempt is over: an HTTP status, or one of gateway.ledger's for those without an answer."""
        ...
