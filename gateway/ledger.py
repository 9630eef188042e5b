"""What was expected of each request, what it got, and why that was less: the last ones in full, all of them in sums.

Plain code: the relay's side (gateway/recorder.py) says what happens and when, and looks up what a settled entry is judged by.
One entry is one attempt: a request that is tried on a second replica has two, under one request id.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from gateway.losses import Case, Loss, LossReason, judge
from transport.deliveries import Delivery

ATTEMPTS_KEPT = 16  # of one request id: clients choose it, and some choose the same one for ever
DELIVERIES_KEPT = 64  # of one attempt: it has one for each of its prompts and choices
UNREPORTED_SECONDS = 5.0  # after the answer's end; a record comes before its first byte
LEFT_STATUS = 499
LOST_STATUS = 0  # the attempt ended without an answer
_NOTHING = Delivery()
_NOT_SERVED = frozenset({LOST_STATUS, 500, 502, 503, 504})


class Considered(Protocol):
    """A way that was considered, with what it was expected to take until the first token."""

    @property
    def replica(self) -> str: ...
    @property
    def source(self) -> str | None: ...
    @property
    def action(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class Planned(msgspec.Struct, frozen=True, gc=False):
    """A decision as the ledger keeps it. Tokens are the prompt's, `*_seconds` what was expected."""

    request_id: str
    tag: int
    at: float  # Unix time, seconds
    endpoint: str
    tenant: str
    model: str
    replica: str
    source: str
    action: str
    reason: str
    prompt_tokens: int
    block_size: int
    local_tokens: int = 0
    peer_tokens: int = 0
    best_available_tokens: int = 0
    best_held_tokens: int = 0
    queue_seconds: float = 0.0
    transfer_seconds: float = 0.0
    prefill_seconds: float = 0.0
    looked_up: bool = True
    parity_exact: bool = True
    reads_cache: bool = True
    reports: bool = True  # the replica has a table, and so tells what it delivers
    options: tuple[Considered, ...] = ()


class Entry(msgspec.Struct, eq=False, gc=False):
    """One attempt. Seconds are since it was sent to its replica; `status` is None while it runs."""

    planned: Planned
    sent_at: float
    deliveries: tuple[Delivery, ...] = ()
    first_byte_seconds: float | None = None
    ended_seconds: float | None = None
    status: int | None = None
    loss: Loss | None = None
    settle_until: float = 0.0
    plain_loss: Loss | None = None
    """What it loses without any history, by the deliveries so far."""

    @property
    def settled(self) -> bool:
        return self.loss is not None

    @property
    def steered(self) -> Delivery | None:
        """The delivery that the plan speaks of: that of the longest prompt, and the first of its choices."""
        found = self.deliveries
        if len(found) == 1:
            return found[0]
        return max(found, key=lambda delivery: delivery.prompt_tokens, default=None)

    def judged(self, formerly: int = 0, elsewhere: int = 0) -> Loss:
        """Judge it by what was delivered so far; see Case for the arguments."""
        if formerly or elsewhere:
            return judge(self.case(formerly, elsewhere))
        if self.plain_loss is None:
            self.plain_loss = judge(self.case())
        return self.plain_loss

    def case(self, formerly: int = 0, elsewhere: int = 0) -> Case:
        """What the attempt is judged by; see Case for the arguments."""
        plan, steered = self.planned, self.steered
        got = _NOTHING if steered is None else steered
        size = plan.block_size  # predictions count in whole blocks, as engines deliver them
        return Case(
            prompt_tokens=plan.prompt_tokens if steered is None else got.prompt_tokens,
            block_size=size,
            predicted_local=plan.local_tokens // size * size,
            predicted_peer=plan.peer_tokens // size * size,
            best_available=plan.best_available_tokens // size * size,
            best_held=plan.best_held_tokens // size * size,
            local=got.local_tokens,
            peer=got.peer_tokens,
            looked_up=plan.looked_up,
            parity_exact=plan.parity_exact,
            reads_cache=plan.reads_cache,
            why=got.why,
            formerly=formerly,
            elsewhere=elsewhere,
        )


@dataclass(slots=True)
class LedgerSums:
    """Over all settled attempts since the start. Tokens of prompts; those that were delivered are of all deliveries."""

    settled: int = 0
    prompt_tokens: int = 0
    predicted_tokens: int = 0
    best_available_tokens: int = 0
    local_tokens: int = 0
    peer_tokens: int = 0
    computed_tokens: int = 0
    unmatched_deliveries: int = 0
    dropped: int = 0
    requests_by_reason: Counter[str] = field(default_factory=Counter)
    lost_tokens_by_reason: Counter[str] = field(default_factory=Counter)


class Ledger:
    """At most `requests_max` entries, oldest out first. Times `now` are in seconds of one monotonic clock."""

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._by_request: dict[str, list[Entry]] = {}
        self._unreported: OrderedDict[int, Entry] = OrderedDict()  # by the time at which they are given up
        self._late: list[Entry] = []
        self.sums = LedgerSums()

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, planned: Planned, now: float) -> Entry:
        """An attempt is sent to its replica."""
        entry = Entry(planned, now)
        self._entries[planned.tag] = entry
        attempts = self._by_request.setdefault(planned.request_id, [])
        attempts.append(entry)
        if len(attempts) > ATTEMPTS_KEPT:
            self._forget(attempts[0])
        if len(self._entries) > self._requests_max:
            self._forget(self._entries.popitem(last=False)[1])
        return entry

    def delivered(self, delivery: Delivery) -> Entry | None:
        """The engine's record of a request; returns its entry if there is one."""
        entry = self._entries.get(delivery.tag) if delivery.tag else None
        if entry is None:
            self.sums.unmatched_deliveries += delivery.tag != 0
        elif len(entry.deliveries) < DELIVERIES_KEPT:
            entry.deliveries += (delivery,)
            entry.plain_loss = None
            if self._unreported and self._unreported.pop(delivery.tag, None) is not None:
                self._late.append(entry)
        return entry

    def first_byte(self, entry: Entry, now: float) -> None:
        """The first byte of the replica's answer came."""
        if entry.first_byte_seconds is None:
            entry.first_byte_seconds = now - entry.sent_at

    def ended(self, entry: Entry, status: int, now: float) -> bool:
        """The attempt is over: LOST_STATUS if the replica gave no answer. True: `settle` it now, there is no more to come."""
        entry.status = status
        entry.ended_seconds = now - entry.sent_at
        if entry.deliveries or self._certain(entry) is not None:
            return True
        entry.settle_until = now + UNREPORTED_SECONDS
        if entry.planned.tag not in self._entries:
            return True  # forgotten meanwhile: its record would not find it
        self._unreported[entry.planned.tag] = entry
        return False

    @property
    def waits(self) -> bool:
        """Whether any attempt that ended is not settled: only then may `due` have some."""
        return bool(self._unreported or self._late)

    def due(self, now: float) -> list[Entry]:
        """Ended attempts to settle: whose record came late, or will not come any more."""
        found, self._late = self._late, []
        while self._unreported:
            tag, entry = next(iter(self._unreported.items()))
            if entry.settle_until > now:
                break
            del self._unreported[tag]
            found.append(entry)
        return found

    def settle(self, entry: Entry, formerly: int = 0, elsewhere: int = 0) -> Loss:
        """Judge an attempt that is over and add it to the sums, once; see Case for the arguments."""
        if entry.loss is not None:
            return entry.loss
        loss = self._certain(entry) or entry.judged(formerly, elsewhere)
        entry.loss = loss
        sums, plan = self.sums, entry.planned
        sums.settled += 1
        sums.prompt_tokens += plan.prompt_tokens
        sums.predicted_tokens += plan.local_tokens + plan.peer_tokens
        sums.best_available_tokens += plan.best_available_tokens
        for delivery in entry.deliveries:
            sums.local_tokens += delivery.local_tokens
            sums.peer_tokens += delivery.peer_tokens
            sums.computed_tokens += delivery.computed_tokens
        sums.requests_by_reason[loss.reason] += 1
        sums.lost_tokens_by_reason[loss.reason] += loss.tokens
        return loss

    def attempts(self, request_id: str) -> Sequence[Entry]:
        """The kept attempts under a request id, oldest first."""
        return tuple(self._by_request.get(request_id, ()))

    def _certain(self, entry: Entry) -> Loss | None:
        """What can be said without a record of what the engine did, None if such a record is there or may still come."""
        for delivery in entry.deliveries:
            if delivery.scheduled_ns:
                return None
        status, plan = entry.status, entry.planned
        if status in _NOT_SERVED:
            return Loss(LossReason.RETRIED, 0, "the replica did not serve it")
        if status == LEFT_STATUS and (entry.deliveries or entry.settle_until):
            return Loss(LossReason.LEFT, 0, "the client left before anything was computed")
        if status is not None and 400 <= status < LEFT_STATUS:
            return Loss(LossReason.NONE, 0, "the engine refused the request")
        if not plan.reports:
            return Loss(LossReason.OFF, 0, "the replica has no block table, so nothing is known of it")
        if not plan.reads_cache:
            return Loss(LossReason.OFF, 0, "the engine computes this request's prompt whole")
        return Loss(LossReason.UNKNOWN, 0, "the engine left no record of it") if entry.settle_until else None

    def _forget(self, entry: Entry) -> None:
        plan = entry.planned
        self._entries.pop(plan.tag, None)
        if self._unreported.pop(plan.tag, None) is not None:
            self._late.append(entry)  # its record would not find it any more
        attempts = self._by_request[plan.request_id]
        if len(attempts) > 1:
            attempts.remove(entry)
        else:
            del self._by_request[plan.request_id]
        self.sums.dropped += not entry.settled
