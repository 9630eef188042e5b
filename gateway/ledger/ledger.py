"""What each request was expected to get, what it got, and why that was less: recent requests in full, all of them in sums.

Plain code: the recorder (recorder.py) says what happens and when. A request that is tried on a second replica has two attempts,
under one request id.
"""

from collections import OrderedDict
from collections.abc import Sequence

from gateway.ledger.attempts import Attempt
from gateway.ledger.judging import judge
from gateway.ledger.misses import Miss, MissReason
from gateway.ledger.stats import LedgerStats
from transport.table.deliveries import Delivery

ATTEMPTS_KEPT = 16  # for one request id: clients choose it, and some use the same one for ever
DELIVERIES_KEPT = 64  # for one attempt: it has one for each of its prompts and choices
UNREPORTED_SECONDS = 5.0  # after the answer's end; a record comes before its first byte
LEFT_STATUS = 499
LOST_STATUS = 0  # the attempt ended without an answer
_NOT_SERVED = frozenset({LOST_STATUS, 500, 502, 503, 504})


class Ledger:
    """At most `requests_max` attempts, oldest out first. Times `now` are in seconds of one monotonic clock."""

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._kept: OrderedDict[int, Attempt] = OrderedDict()
        self._by_request: dict[str, tuple[int, ...]] = {}
        self._unreported: OrderedDict[int, Attempt] = OrderedDict()  # in the order in which they are given up
        self._late: list[Attempt] = []  # ended before their records came
        self.sums = LedgerStats()

    def __len__(self) -> int:
        return len(self._kept)

    def open(self, attempt: Attempt) -> None:
        """An attempt is sent to its replica."""
        tag, request_id = attempt.tag, attempt.info.request_id
        self._kept[tag] = attempt
        others = self._by_request.get(request_id)
        if others is None:
            self._by_request[request_id] = (tag,)
        else:
            self._by_request[request_id] = (*others, tag)
            if len(others) >= ATTEMPTS_KEPT:
                self._forget(others[0], self._kept.pop(others[0]))
        if len(self._kept) > self._requests_max:
            self._forget(*self._kept.popitem(last=False))

    def delivered(self, delivery: Delivery) -> None:
        """The engine's record of a request."""
        tag, sums = delivery.tag, self.sums
        attempt = self._kept.get(tag) if tag else None
        if attempt is None:
            sums.unmatched_deliveries += tag != 0
            return
        if len(attempt.deliveries) < DELIVERIES_KEPT:
            attempt.add(delivery)
            sums.local_tokens += delivery.local_tokens
            sums.peer_tokens += delivery.peer_tokens
            sums.computed_tokens += delivery.computed_tokens
            if self._unreported and self._unreported.pop(tag, None) is not None:
                self._late.append(attempt)

    def ended(self, attempt: Attempt, status: int, now: float) -> None:
        """The attempt is over: LOST_STATUS if the replica gave no answer. It is settled, unless its record may still come."""
        attempt.status = status
        attempt.ended_seconds = now - attempt.began_at
        if not attempt.deliveries and self._certain(attempt) is None:
            attempt.settle_until = now + UNREPORTED_SECONDS
            if attempt.tag in self._kept:  # otherwise it was dropped, and its record would not be matched
                self._unreported[attempt.tag] = attempt
                return
        self._settle(attempt)
        if self._late or self._unreported:
            self.settle_late(now)

    def settle_late(self, now: float) -> None:
        """Settle ended attempts whose records came late, or are no longer expected."""
        while self._unreported:
            tag, attempt = next(iter(self._unreported.items()))
            if attempt.settle_until > now:
                break
            del self._unreported[tag]
            self._late.append(attempt)
        late, self._late = self._late, []
        for attempt in late:
            self._settle(attempt)

    def attempts(self, request_id: str) -> Sequence[Attempt]:
        """The kept attempts under a request id, oldest first."""
        return tuple(self._kept[tag] for tag in self._by_request.get(request_id, ()))

    def _settle(self, attempt: Attempt) -> None:
        """Judge an attempt that is over and add it to the sums, once."""
        miss = attempt.miss = self._certain(attempt) or judge(attempt)
        sums, decision = self.sums, attempt.decision
        expected = decision.expected
        sums.settled += 1
        sums.prompt_tokens += attempt.prompt_tokens
        sums.predicted_tokens += expected.local_tokens + expected.peer_tokens
        sums.best_available_tokens += decision.best_available_tokens
        sums.count(miss)

    def _certain(self, attempt: Attempt) -> Miss | None:
        """The judgement without the engine's record; None if there is one, or it may still come."""
        for delivery in attempt.deliveries:
            if delivery.scheduled_ns:
                return None
        status = attempt.status
        if status in _NOT_SERVED:
            return Miss(MissReason.RETRIED, 0, "the replica did not serve it")
        if status == LEFT_STATUS and (attempt.deliveries or attempt.settle_until):
            return Miss(MissReason.LEFT, 0, "the client left before anything was computed")
        if status is not None and 400 <= status < LEFT_STATUS:
            return Miss(MissReason.NONE, 0, "the engine refused the request")
        if not attempt.reports:
            return Miss(MissReason.OFF, 0, "the replica has no block table, so nothing is known of it")
        if not attempt.reads_cache:
            return Miss(MissReason.OFF, 0, "the engine computes this request's prompt whole")
        return Miss(MissReason.UNKNOWN, 0, "the engine left no record of it") if attempt.settle_until else None

    def _forget(self, tag: int, attempt: Attempt) -> None:
        """Drop an attempt."""
        request_id = attempt.info.request_id
        others = self._by_request.pop(request_id)
        if len(others) > 1:
            self._by_request[request_id] = tuple(other for other in others if other != tag)
        waits = self._unreported.pop(tag, None) is not None
        if waits:
            self._late.append(attempt)  # its record can no longer be matched
        self.sums.dropped += waits or attempt.status is None
