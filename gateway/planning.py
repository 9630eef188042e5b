"""What the front door asks of the planner: the seam between relaying and steering."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, Protocol, TypeVar

from engine.fleet import Replica
from gateway.body import Endpoint
from gateway.tenants import TenantContext


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


PlanT = TypeVar("PlanT", bound=Plan)


class PlannerLike(Protocol[PlanT]):
    """Decides which replica gets a request, and counts what is in flight."""

    async def plan(self, endpoint: Endpoint, body: dict[str, Any], tenant: TenantContext, *, pinned: str | None) -> PlanT:
        """A plan for the request. Raises ApiError: NoReplicaReady, PromptTooLong, UnknownReplica, ReplicaNotReady."""
        ...

    def replan(self, plan: PlanT, *, exclude: Set[str]) -> PlanT:
        """Another plan for the same request, on none of the excluded replicas. Raises NoReplicaReady."""
        ...

    def started(self, plan: PlanT) -> None:
        """The request is about to be sent to `plan.replica`."""
        ...

    def first_byte(self, plan: PlanT) -> None:
        """The first byte of the replica's answer came, for streams that of the first event; further calls change nothing."""
        ...

    def finished(self, plan: PlanT) -> None:
        """The request ended there, well or not; called once for each `started`."""
        ...
