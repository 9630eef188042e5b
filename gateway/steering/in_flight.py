"""Requests between their sending and their end: they weigh on their replica, and what became of them teaches the cost model."""

from collections.abc import Callable, Mapping

from gateway.block_registry.tables import Table
from gateway.steering.costs.model import CostModel, ModelKey, Outcome
from gateway.steering.costs.priors import REMOTE_TRANSPORT
from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.load import FleetLoad, Ticket
from transport.node.names import node_of
from transport.table.deliveries import Delivery, DeliveryReason, EngineLoad
from transport.table.tiers import way

REFUSALS = frozenset({DeliveryReason.SOURCE_UNREADABLE, DeliveryReason.NOT_EXCHANGING})
"""With these an engine says that it will not import from that source as long as both live."""


class Flight(Ticket, gc=False, eq=False):
    """A planned request, what `load` was ahead of it at `decided_at`, what was expected, and what came of it so far.

    `streamed` says that the replica's first byte is the first token; `teaches` that the plan speaks of all that the
    request asks, `reports` that the engine tells when the first token came, `stepless` that it makes no step for the request.
    """

    key: ModelKey
    load: ReplicaLoad
    transport: str
    decided_at: float
    expected_seconds: float
    streamed: bool
    teaches: bool
    reports: bool
    stepless: bool = False
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
        self._aloft: dict[int, Flight] = {}
        self._said: dict[str, EngineLoad] = {}

    @property
    def any(self) -> bool:
        """Whether a request is under way."""
        return bool(self._aloft)

    def started(self, flight: Flight, now: float) -> None:
        """The request is about to be sent."""
        self._aloft[flight.tag] = flight
        self._load.started(flight, now, silent=not (flight.streamed or flight.reports))

    def first_byte(self, flight: Flight, now: float) -> None:
        """The first byte of the replica's answer came. Only the first call for a request counts."""
        if flight.first_byte_at or flight.tag not in self._aloft:
            return
        flight.first_byte_at = now
        if flight.delivery is None:  # else the engine has told of the first token
            self._load.first_byte(flight, now)
        if flight.streamed:
            self._teach(flight)

    def finished(self, flight: Flight, now: float) -> None:
        """The request ended, well or not."""
        if self._aloft.pop(flight.tag, None) is not None:
            if not flight.taught:
                self._teach(flight)
            self._load.finished(flight, now)

    def waiting(self) -> Mapping[str, list[Flight]]:
        """For each replica the requests that wait for a step that brings their first token; those without any are left out."""
        found: dict[str, list[Flight]] = {}
        for flight in self._aloft.values():
            if flight.delivery is None and not flight.first_byte_at and not flight.stepless:
                found.setdefault(flight.replica, []).append(flight)
        return found

    def keep(self, tables: Mapping[str, Table]) -> None:
        """Forget what all other engines said of their load."""
        for name in [name for name in self._said if name not in tables]:
            del self._said[name]
            self._load.forget(name)

    def listen_to(self, tables: Mapping[str, Table]) -> None:
        """Take in what all engines say of their load."""
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
        flight = self._aloft.get(delivery.tag)
        if flight is None or not delivery.first_token_ns or flight.delivery is not None:
            return
        flight.delivery = delivery
        if flight.source is not None and delivery.why in REFUSALS:
            self._refused(replica, flight.source)
        self._load.first_byte(flight, delivery.first_token_ns / 1e9)
        if not flight.streamed or flight.first_byte_at:
            self._teach(flight)

    def _teach(self, flight: Flight) -> None:
        """Tell the cost model once, as soon as the time and the tokens are both known."""
        delivery, source, came_at = flight.delivery, flight.source, flight.first_byte_at
        if delivery is not None:
            source = delivery.source or None
            if not flight.streamed:
                came_at = delivery.first_token_ns / 1e9
        elif flight.reports or not flight.streamed:
            return
        if came_at <= flight.decided_at or flight.taught or not flight.teaches:
            return
        flight.taught = True
        if self._costs.wants(flight.key, source, came_at):
            self._costs.observe(_outcome(flight, source, delivery, came_at - flight.decided_at))


def _way(flight: Flight, source: str) -> str:
    """Return how an import comes: from another node than the replica's, or within the node."""
    across = source and node_of(source) != node_of(flight.replica)
    return REMOTE_TRANSPORT if across else way(flight.transport, source)


def _outcome(flight: Flight, source: str | None, delivery: Delivery | None, seconds: float) -> Outcome:
    return Outcome(
        key=flight.key,
        replica=flight.replica,
        source=source,
        transport=_way(flight, source or ""),
        load=flight.load,
        now=flight.decided_at,
        prompt_tokens=delivery.prompt_tokens if delivery else flight.prompt_tokens,
        computed_tokens=delivery.computed_tokens if delivery else flight.new_tokens,
        peer_tokens=delivery.peer_tokens if delivery else (flight.cached_tokens if source else 0),
        expected_seconds=flight.expected_seconds,
        first_byte_seconds=seconds,
        import_seconds=delivery.import_wait_ns / 1e9 if delivery and delivery.import_wait_ns else None,
        import_bytes=delivery.import_bytes if delivery else 0,
        import_failed=delivery is not None and delivery.failed_blocks > 0,
        import_mixed=delivery is not None and bool(delivery.further),
    )
