"""What the front door asks of the planner: the seam between relaying and steering."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, Protocol, TypeVar

from engine.fleet import Replica
from gateway.api.body import Endpoint
from gateway.ledger.attempts import Asked, Entry
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


PlanT = TypeVar("PlanT", bound=Plan)


class PlannerLike(Protocol[PlanT]):
    """Decides which replica gets a request, and counts what is in flight."""

    async def read(self, endpoint: Endpoint, body: dict[str, Any], tenant: TenantContext, *, pinned: str | None) -> Any:
        """What `decide` needs. Raises ApiError: NoReplicaReady, PromptTooLong, UnknownReplica, ReplicaNotReady."""
        ...

    def decide(self, asked: Any) -> PlanT:
        """A plan for what was read. Raises ApiError: NoReplicaReady, UnknownReplica, ReplicaNotReady."""
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


PlanT_contra = TypeVar("PlanT_contra", contravariant=True)


class Witness(Protocol[PlanT_contra]):
    """Is told of each attempt to serve a request, in this order and on the event loop's thread."""

    def sent(self, plan: PlanT_contra, asked: Asked) -> Entry:
        """The request is about to be sent to the plan's replica."""
        ...

    def first_byte(self, entry: Entry) -> bytes:
        """The replica's answer begins, or is there as a whole; returns the value of x-peerkv-cache, empty if not known."""
        ...

    def ended(self, entry: Entry, status: int) -> None:
        """The attempt is over: an HTTP status, or one of gateway.ledger's for those without an answer."""
        ...
