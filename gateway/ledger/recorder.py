"""Reports each attempt to those who count it: steering's load and the ledger.

Between the relay, which knows when things happen, and the tables, which tell what was delivered.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from gateway.block_registry.tables import Table
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.judging import judge
from gateway.ledger.ledger import Ledger
from gateway.ledger.misses import MissReason
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity import Parity
from transport.table.deliveries import Delivery

_EXACT = Parity.EXACT
_CHATS = frozenset(("chat", "messages", "responses"))
_REASONS = {reason: f", reason={reason}".encode() for reason in MissReason}


class Recorder:
    """Belongs to the event loop's thread. `clock` is the planner's, `wall_clock` gives Unix time in seconds."""

    def __init__(
        self,
        ledger: Ledger,
        planner: Planner,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.feed = planner.feed
        self._planner = planner
        self._fleet = planner.fleet
        self._flights = planner.flights
        self._outliers = planner.outliers
        self._clock = clock
        self._wall_clock = wall_clock
        self.feed.add(self._delivered)

    def begin(self, plan: Plan, info: RequestInfo) -> Attempt:
        """The request is about to be sent to the plan's replica.

        Call it without an await after the planner's `decide` or `replan`: the next plan then knows of this request.
        """
        known, decision, now = plan.request.known, plan.decision, self._clock()
        table = self._fleet.latest.tables.get(decision.replica)
        attempt = Attempt(
            info=info,
            decision=decision,
            tag=plan.tag,
            at=self._wall_clock(),
            began_at=now,
            prompt_tokens=plan.prompt_tokens,
            block_size=table.block_size if table is not None else 1,
            best_held_tokens=plan.held_tokens_max,
            formerly_tokens=plan.formerly_tokens,
            flushed=plan.flushed,
            looked_up=known.ids is not None,
            parity_exact=known.certain or self._exact(info),
            reads_cache=known.cacheable,
            reports=table is not None,
            why_unknown=known.why_unknown,
            pinned=plan.request.wanted_replica is not None,
            promotion=plan.request.promotion,
            flight=plan.flight,
        )
        self.ledger.open(attempt)
        self._outliers.sent(decision.replica)
        self._flights.started(plan.flight, now)
        return attempt

    def first_byte(self, attempt: Attempt) -> bytes:
        """The replica's answer begins, a stream's with its first event; further calls change nothing.

        Returns the value of the header x-peerkv-cache, empty if nothing is known.
        """
        now = self._clock()
        self.feed.poll(attempt.decision.replica)
        if attempt.flight is not None:
            self._flights.first_byte(attempt.flight, now)
        if attempt.first_byte_seconds is None:
            attempt.first_byte_seconds = now - attempt.began_at
        return cache_header(attempt)

    def stream_begins(self, attempt: Attempt) -> bytes:
        """As `first_byte`, of an answer that is streamed: the replica has not failed."""
        self._outliers.began(attempt.decision.replica, self._clock())
        return self.first_byte(attempt)

    def was_borne(self, attempt: Attempt) -> bool:
        """Whether the engine is known to have computed the prompt, or not to have begun; to be asked before `ended`."""
        flight = attempt.flight
        if flight is None:
            return False
        self.feed.poll(flight.replica)
        if flight.delivery is not None or flight.first_byte_at or self.feed.waits(flight.replica, flight.tag):
            return True
        return not flight.reports and not flight.streamed and flight.ready_at <= self._clock()

    def ended(self, attempt: Attempt, status: int) -> None:
        """The attempt is over, with this HTTP status, or one of gateway.ledger's for those without an answer."""
        now = self._clock()
        self._outliers.ended(attempt.decision.replica, status, now)
        self.feed.poll(attempt.decision.replica)  # a request of several choices has several records
        if attempt.flight is not None:
            self._flights.finished(attempt.flight, now)
            attempt.flight = None
        self.ledger.ended(attempt, status, now)

    def catch_up(self) -> None:
        """Read what is new in all tables and settle what can be: before somebody looks at the figures."""
        self._fleet.now()
        self.feed.refresh()
        self.ledger.settle_late(self._clock())

    def _delivered(self, replica: str, table: Table, delivery: Delivery) -> None:
        self.ledger.delivered(delivery)

    def _exact(self, info: RequestInfo) -> bool:
        """Whether our token ids are known to be the engine's at this moment."""
        parity = self._planner.prompts.parity
        return (parity.chat if info.endpoint in _CHATS else parity.completions).parity is _EXACT


def _all_sources(delivery: Delivery) -> bytes:
    """The sources of an import, in the order of the prompt, and the tokens from each, as two more fields of the header."""
    found = delivery.sources()
    names, tokens = " ".join(f'"{each.source}"' for each in found), " ".join(str(each.tokens) for each in found)
    return f", sources=({names}), source_tokens=({tokens})".encode("latin-1")


def cache_header(attempt: Attempt) -> bytes:
    """Where the prompt's tokens came from, as a dictionary of structured fields (RFC 9651); empty if not known."""
    found, steered = attempt.deliveries, attempt.steered
    if steered is None or not steered.scheduled_ns:
        return b""
    local, peer, computed = steered.local_tokens, steered.peer_tokens, steered.computed_tokens
    if len(found) > 1:
        local = sum(delivery.local_tokens for delivery in found)
        peer = sum(delivery.peer_tokens for delivery in found)
        computed = sum(delivery.computed_tokens for delivery in found)
    source = f', source="{steered.source}"'.encode("latin-1") if steered.peer_tokens else b""
    if steered.further:
        source += _all_sources(steered)
    return b"local=%d, peer=%d, computed=%d%b%b" % (local, peer, computed, source, _REASONS[judge(attempt).reason])
