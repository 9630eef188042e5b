"""What is in front of a new request on each replica: this gateway's requests in flight, and the engines' own words.

Pure bookkeeping in CLOCK_MONOTONIC seconds. A ticket stands for a request from its sending to its end. Belongs to one thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from gateway.block_registry.chain import Chain
from gateway.steering.costs.replica_load import IDLE, ReplicaLoad
from gateway.steering.pending_prefixes import Promises

DECODE_SHARE = 0.1
"""Weight of the newest answer in the mean time that answers take behind their first token."""
DECODE_FACTOR_MAX = 4.0
"""One answer counts as at most so many mean ones: a client may take an hour to read what was decoded in a second."""


class EngineWords(Protocol):
    """What an engine says of itself (`transport.table.EngineLoad`), other gateways' requests included."""

    @property
    def waiting_requests(self) -> int: ...
    @property
    def waiting_tokens(self) -> int: ...
    @property
    def decoding_requests(self) -> int: ...


class Ticket(msgspec.Struct, gc=False, eq=False):
    """A request that was sent. `cached_tokens` of its prompt are expected out of a cache, from `source` if there is one.

    `new_tokens` are computed; each of them makes a pair with every token before it, `new_pairs` in all. `chain` has the keys of
    its full blocks of `block_size` tokens: what the replica will hold at `ready_at`.
    """

    tag: int
    replica: str
    source: str | None
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    new_pairs: float
    ready_at: float
    chain: Chain | None
    block_size: int


@dataclass(slots=True)
class _Replica:
    """One replica's tickets by tag. `tokens`, `pairs` and `importing` are sums over those `waiting`, exact: pairs are halves.

    `decoding` has the times of the first tokens, `silent` those of which nobody will tell the time.
    """

    waiting: dict[int, Ticket] = field(default_factory=dict)
    tokens: int = 0
    pairs: float = 0.0
    importing: int = 0
    decoding: dict[int, float] = field(default_factory=dict)
    since: float = 0.0
    reading: int = 0
    silent: dict[int, Ticket] = field(default_factory=dict)
    words: tuple[int, int, int] | None = None
    load: ReplicaLoad | None = IDLE


class FleetLoad:
    """Tickets of all replicas, and what the engines said last."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._promises = Promises()
        self.decode_seconds = 0.0
        """Mean time from the first token of an answer to its end."""

    def started(self, ticket: Ticket, now: float, *, silent: bool = False) -> None:
        """The request is about to be sent. `silent`: nobody will tell of its first token; it counts as come when expected."""
        place = self._replicas.get(ticket.replica) or self._place(ticket.replica)
        if not place.waiting:
            place.since = now
        place.waiting[ticket.tag] = ticket
        place.tokens += ticket.new_tokens
        place.pairs += ticket.new_pairs
        place.load = None
        if ticket.source is not None:
            self._imports(place, ticket.source, 1)
        if silent:
            place.silent[ticket.tag] = ticket
        self._promises.add(ticket)

    def first_byte(self, ticket: Ticket, now: float) -> None:
        """The first token came: the prompt is computed, the answer is being decoded. Once or more often, or never."""
        place = self._replicas.get(ticket.replica)
        if place is not None and place.waiting.pop(ticket.tag, None) is not None:
            place.decoding[ticket.tag] = now
            self._answered(place, ticket, now)

    def finished(self, ticket: Ticket, now: float) -> None:
        """The request ended, well or not."""
        place, tag = self._replicas.get(ticket.replica), ticket.tag
        if place is None:
            return
        began = place.decoding.pop(tag, None)
        if began is not None:
            place.load = None
            mean = self.decode_seconds
            self.decode_seconds += DECODE_SHARE * (min(now - began, DECODE_FACTOR_MAX * mean) - mean) if mean else now - began
        elif place.waiting.pop(tag, None) is not None:
            self._answered(place, ticket, now)

    def heard(self, replica: str, words: EngineWords) -> None:
        """Take in what an engine says of itself now."""
        said = (words.waiting_requests, words.waiting_tokens, words.decoding_requests)
        place = self._place(replica)
        if said != place.words:
            place.words, place.load = said, None

    def forget(self, replica: str) -> None:
        """An engine is gone: what it said of itself counts no more. Its tickets end on their own."""
        place = self._place(replica)
        place.words, place.load = None, None

    def load(self, replica: str, now: float) -> ReplicaLoad:
        """What is in front of a request there; the time that passes since is the cost model's to reckon with."""
        place = self._replicas.get(replica)
        if place is None:
            return IDLE
        if place.silent:
            for ticket in [ticket for ticket in place.silent.values() if ticket.ready_at <= now]:
                self.first_byte(ticket, now)
        if place.load is None:
            place.load = _summed(place)
        return place.load

    def promised(self, chain: Chain, block_size: int) -> Mapping[str, int]:
        """For each replica that computes a prefix of `chain` now, the tokens of the longest such one."""
        return self._promises.find(chain, block_size)

    def in_flight(self) -> dict[str, int]:
        """Requests with each replica now, replicas without any left out."""
        counts = {name: len(place.waiting) + len(place.decoding) for name, place in self._replicas.items()}
        return {name: count for name, count in counts.items() if count}

    def _place(self, replica: str) -> _Replica:
        place = self._replicas.get(replica)
        if place is None:
            place = self._replicas[replica] = _Replica()
        return place

    def _answered(self, place: _Replica, ticket: Ticket, now: float) -> None:
        place.since = now
        place.tokens -= ticket.new_tokens
        place.pairs -= ticket.new_pairs
        place.load = None
        if ticket.source is not None:
            self._imports(place, ticket.source, -1)
        if place.silent:
            place.silent.pop(ticket.tag, None)
        self._promises.remove(ticket)

    def _imports(self, place: _Replica, source: str, change: int) -> None:
        """Imports under way from `source` begin or end."""
        place.importing += change
        read = self._place(source)
        read.reading += change
        read.load = None


def _summed(place: _Replica) -> ReplicaLoad:
    head = next(iter(place.waiting.values()), None)
    waiting = len(place.waiting)
    # an engine knows best what it decodes: other gateways' answers too, and none that a slow client still reads
    requests, tokens, decoding = place.words or (0, 0, len(place.decoding))
    if requests > waiting:
        waiting = requests
    return ReplicaLoad(
        tokens=place.tokens,
        pairs=place.pairs,
        head_tokens=head.new_tokens if head is not None else 0,
        head_pairs=head.new_pairs if head is not None else 0.0,
        since=place.since,
        engine_tokens=tokens,
        engine_pairs=tokens * tokens / (2 * (requests or 1)) if tokens else 0.0,
        waiting=waiting,
        requests=waiting + decoding,
        decoding=decoding,
        importing=place.importing,
        reading=place.reading,
    )
