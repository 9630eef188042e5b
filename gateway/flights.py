"""Requests between their sending and their end: they weigh on their replica, and what became of them teaches the cost model."""

from collections.abc import Callable, Mapping

import msgspec

from gateway.costs import CostModel, ModelKey, Outcome
from gateway.load import FleetLoad, ReplicaLoad, Ticket
from gateway.tables import Table
from transport.deliveries import Delivery, DeliveryReason, EngineLoad

REFUSALS = frozenset({DeliveryReason.SOURCE_UNREADABLE, DeliveryReason.NOT_EXCHANGING})
"""With these an engine says that it will not import from that source as long as both live."""


class Flight(msgspec.Struct, frozen=True, gc=False, eq=False):
    """A planned request: its `ticket`, what `load` was ahead of it at `decided_at`, and what was expected.

    `streamed` says that the replica's first byte is the first token; `teaches` that the plan speaks of all that the
    request asks, `reports` says that the engine tells when the first token came.
    """

    ticket: Ticket
    key: ModelKey
    load: ReplicaLoad
    transport: str
    decided_at: float
    expected_seconds: float
    streamed: bool
    teaches: bool
    reports: bool


class _Aloft(msgspec.Struct, gc=False, eq=False):
    flight: Flight
    first_byte_at: float = 0.0
    delivery: Delivery | None = None
    taught: bool = False


class Flights:
    """Feeds `load` and `costs`; `refused` is told which replica does not import from which.

    Times are CLOCK_MONOTONIC seconds, which the engines' are too. Belongs to one thread.
    """

    def __init__(
        self, load: FleetLoad, costs: CostModel, refused: Callable[[str, str], None] = lambda taker, source: None
    ) -> None:
        self._load = load
        self._costs = costs
        self._refused = refused
        self._aloft: dict[int, _Aloft] = {}
        self._said: dict[str, EngineLoad] = {}
        self._tables: Mapping[str, Table] | None = None

    @property
    def any(self) -> bool:
        """Whether a request is under way."""
        return bool(self._aloft)

    def started(self, flight: Flight, now: float) -> None:
        """The request is about to be sent."""
        self._aloft[flight.ticket.tag] = _Aloft(flight)
        self._load.started(flight.ticket, now, silent=not (flight.streamed or flight.reports))

    def first_byte(self, tag: int, now: float) -> None:
        """The first byte of the replica's answer came. Only the first call for a request counts."""
        aloft = self._aloft.get(tag)
        if aloft is None or aloft.first_byte_at:
            return
        aloft.first_byte_at = now
        self._load.first_byte(tag, now)
        if aloft.flight.streamed:
            self._teach(aloft)

    def finished(self, tag: int, now: float) -> None:
        """The request ended, well or not."""
        aloft = self._aloft.pop(tag, None)
        if aloft is not None:
            self._teach(aloft)
            self._load.finished(tag, now)

    def listen_to(self, tables: Mapping[str, Table]) -> None:
        """Take in what all engines say of their load, and forget what those said that are gone; `tables` does not change."""
        if tables is not self._tables:
            self._tables = tables
            for name in [name for name in self._said if name not in tables]:
                del self._said[name]
                self._load.forget(name)
        for name, table in tables.items():
            self.listen(name, table)

    def listen(self, replica: str, table: Table) -> None:
        """Take in what an engine says of its load."""
        said = table.load()
        if said is not self._said.get(replica):
            self._said[replica] = said
            self._load.heard(replica, said)

    def delivered(self, replica: str, table: Table, delivery: Delivery) -> None:
        """Take in what an engine tells of a request, each record once."""
        aloft = self._aloft.get(delivery.tag)
        if aloft is None or not delivery.first_token_ns or aloft.delivery is not None:
            return
        aloft.delivery = delivery
        source = aloft.flight.ticket.source
        if source is not None and delivery.why in REFUSALS:
            self._refused(replica, source)
        self._load.first_byte(delivery.tag, delivery.first_token_ns / 1e9)
        if not aloft.flight.streamed or aloft.first_byte_at:
            self._teach(aloft)

    def _teach(self, aloft: _Aloft) -> None:
        """Tell the cost model once, as soon as the time and the tokens are both known."""
        flight, delivery = aloft.flight, aloft.delivery
        ticket = flight.ticket
        if aloft.taught or not flight.teaches or (delivery is None and (flight.reports or not flight.streamed)):
            return
        if flight.streamed:
            if not aloft.first_byte_at:
                return
            seconds = aloft.first_byte_at - flight.decided_at
        else:
            assert delivery is not None
            seconds = delivery.first_token_ns / 1e9 - flight.decided_at
        if seconds <= 0:
            return
        aloft.taught = True
        source = delivery.source or None if delivery is not None else ticket.source
        if self._costs.wants(flight.key, source, flight.decided_at + seconds):
            self._costs.observe(_outcome(flight, source, delivery, seconds))


def _outcome(flight: Flight, source: str | None, delivery: Delivery | None, seconds: float) -> Outcome:
    ticket = flight.ticket
    return Outcome(
        key=flight.key,
        replica=ticket.replica,
        source=source,
        transport=flight.transport,
        load=flight.load,
        now=flight.decided_at,
        prompt_tokens=delivery.prompt_tokens if delivery else ticket.prompt_tokens,
        computed_tokens=delivery.computed_tokens if delivery else ticket.new_tokens,
        peer_tokens=delivery.peer_tokens if delivery else (ticket.cached_tokens if source else 0),
        expected_seconds=flight.expected_seconds,
        first_byte_seconds=seconds,
        import_seconds=delivery.import_wait_ns / 1e9 if delivery and delivery.import_wait_ns else None,
        import_bytes=delivery.import_bytes if delivery else 0,
        import_failed=delivery is not None and delivery.failed_blocks > 0,
    )
