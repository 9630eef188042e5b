"""What was expected of each request, what it got, and why that was less: the last ones in full, all of them in sums.

Plain code: the recorder (recorder.py) says what happens and when, and looks up what a settled entry is judged by.
One entry is one attempt: a request that is tried on a second replica has two, under one request id.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.ledger.attempts import Entry, Packed, Planned
from gateway.ledger.misses import Miss, MissReason
from transport.table.deliveries import Delivery

ATTEMPTS_KEPT = 16  # of one request id: clients choose it, and some choose the same one for ever
DELIVERIES_KEPT = 64  # of one attempt: it has one for each of its prompts and choices
UNREPORTED_SECONDS = 5.0  # after the answer's end; a record comes before its first byte
LEFT_STATUS = 499
LOST_STATUS = 0  # the attempt ended without an answer
_NOT_SERVED = frozenset({LOST_STATUS, 500, 502, 503, 504})


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
    """At most `requests_max` entries, oldest out first. Times `now` are in seconds of one monotonic clock.

    What is settled is kept packed: thousands of entries with all that they refer to would fill the processor's caches.
    """

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._kept: OrderedDict[int, Entry | Packed] = OrderedDict()
        self._by_request: dict[str, tuple[int, ...]] = {}
        self._unreported: OrderedDict[int, Entry] = OrderedDict()  # by the time at which they are given up
        self._over: list[Entry] = []
        self.sums = LedgerSums()

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, planned: Planned, now: float, ids: Sequence[int] | None = None, lora: str = "") -> Entry:
        """An attempt is sent to its replica; `ids` are its prompt, for the adapter `lora`."""
        entry = Entry(planned, now, ids, lora)
        tag, request_id = planned.tag, planned.asked.request_id
        self._kept[tag] = entry
        others = self._by_request.get(request_id)
        if others is None:
            self._by_request[request_id] = (tag,)
        else:
            self._by_request[request_id] = (*others, tag)
            if len(others) >= ATTEMPTS_KEPT:
                self._forget(others[0], self._kept.pop(others[0]))
        if len(self._kept) > self._requests_max:
            self._forget(*self._kept.popitem(last=False))
        return entry

    def delivered(self, delivery: Delivery) -> None:
        """The engine's record of a request."""
        tag = delivery.tag
        kept = self._kept.get(tag) if tag else None
        if kept is None:
            self.sums.unmatched_deliveries += tag != 0
            return
        entry = kept.unpacked() if isinstance(kept, Packed) else kept
        if len(entry.deliveries) < DELIVERIES_KEPT:
            entry.deliveries += (delivery,)
            entry.plain_loss = None
            if self._unreported and self._unreported.pop(tag, None) is not None:
                self._over.append(entry)
            if entry is not kept:
                self._kept[tag] = entry.packed()

    def first_byte(self, entry: Entry, now: float) -> None:
        """The first byte of the replica's answer came."""
        if entry.first_byte_seconds is None:
            entry.first_byte_seconds = now - entry.sent_at

    def ended(self, entry: Entry, status: int, now: float) -> bool:
        """The attempt is over: LOST_STATUS if the replica gave no answer. False: its record may still come."""
        entry.status = status
        entry.ended_seconds = now - entry.sent_at
        if not entry.deliveries:
            if self._certain(entry) is not None:
                self.settle(entry)
                return True
            entry.settle_until = now + UNREPORTED_SECONDS
            tag = entry.planned.tag
            if tag in self._kept:  # else it is forgotten: its record would not find it
                self._unreported[tag] = entry
                return False
        self._over.append(entry)
        return True

    def due(self, now: float) -> list[Entry]:
        """Ended attempts to settle: what became of them is known, or will not be known any more."""
        found, self._over = self._over, []
        while self._unreported:
            tag, entry = next(iter(self._unreported.items()))
            if entry.settle_until > now:
                break
            del self._unreported[tag]
            found.append(entry)
        return found

    def settle(self, entry: Entry, formerly: int = 0, elsewhere: int = 0) -> Miss:
        """Judge an attempt that is over and add it to the sums, once; see Case for the arguments."""
        if entry.loss is not None:
            return entry.loss
        loss = self._certain(entry) or entry.judged(formerly, elsewhere)
        entry.loss = loss
        sums, plan = self.sums, entry.planned
        expected = plan.decision.expected
        sums.settled += 1
        sums.prompt_tokens += plan.prompt_tokens
        sums.predicted_tokens += expected.local_tokens + expected.peer_tokens
        sums.best_available_tokens += plan.decision.best_available_tokens
        for delivery in entry.deliveries:
            sums.local_tokens += delivery.local_tokens
            sums.peer_tokens += delivery.peer_tokens
            sums.computed_tokens += delivery.computed_tokens
        sums.requests_by_reason[loss.reason] += 1
        sums.lost_tokens_by_reason[loss.reason] += loss.tokens
        if plan.tag in self._kept:
            self._kept[plan.tag] = entry.packed()
        return loss

    def attempts(self, request_id: str) -> Sequence[Entry]:
        """The kept attempts under a request id, oldest first."""
        found = [self._kept[tag] for tag in self._by_request.get(request_id, ())]
        return tuple(kept.unpacked() if isinstance(kept, Packed) else kept for kept in found)

    def _certain(self, entry: Entry) -> Miss | None:
        """What can be said without a record of what the engine did, None if such a record is there or may still come."""
        for delivery in entry.deliveries:
            if delivery.scheduled_ns:
                return None
        status, plan = entry.status, entry.planned
        if status in _NOT_SERVED:
            return Miss(MissReason.RETRIED, 0, "the replica did not serve it")
        if status == LEFT_STATUS and (entry.deliveries or entry.settle_until):
            return Miss(MissReason.LEFT, 0, "the client left before anything was computed")
        if status is not None and 400 <= status < LEFT_STATUS:
            return Miss(MissReason.NONE, 0, "the engine refused the request")
        if not plan.reports:
            return Miss(MissReason.OFF, 0, "the replica has no block table, so nothing is known of it")
        if not plan.reads_cache:
            return Miss(MissReason.OFF, 0, "the engine computes this request's prompt whole")
        return Miss(MissReason.UNKNOWN, 0, "the engine left no record of it") if entry.settle_until else None

    def _forget(self, tag: int, kept: Entry | Packed) -> None:
        """`kept` is kept no longer."""
        others = self._by_request.pop(kept.request_id)
        if len(others) > 1:
            self._by_request[kept.request_id] = tuple(other for other in others if other != tag)
        if isinstance(kept, Entry):
            waits = self._unreported.pop(tag, None) is not None
            if waits:
                self._over.append(kept)  # its record would not find it any more
            self.sums.dropped += waits or kept.status is None
