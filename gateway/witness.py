"""What the relay tells of each attempt: the seam between relaying and the ledger."""

from __future__ import annotations

from typing import Protocol, TypeVar

from gateway.attempts import Asked, Entry

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
