"""Requests whose bodies are still arriving: they have a bound of their own, and take no slots from those that are served."""

from __future__ import annotations

from collections import OrderedDict

from gateway.errors import InvalidRequest
from gateway.http_server.transaction import Transaction

RATE_SECONDS_MIN = 1.0
"""What came in less than a second says nothing of an upload's speed."""


class Uploads:
    """At most `uploads_max`. Of more, one ends: of the caller who has most, the one of which nothing came for longest.

    So who has a body to send gets a place whatever others hold back, and a caller's excess costs that caller alone. Belongs to
    one event loop.
    """

    def __init__(self, uploads_max: int) -> None:
        self._uploads_max = uploads_max
        self._count = 0
        self._by_caller: dict[str, OrderedDict[Transaction, None]] = {}  # the one that has sent nothing for longest comes first

    def __len__(self) -> int:
        return self._count

    def begin(self, caller: str, transaction: Transaction) -> None:
        """This caller's request waits for its body."""
        self._by_caller.setdefault(caller, OrderedDict())[transaction] = None
        self._count += 1
        if self._count > self._uploads_max:
            most = max(self._by_caller, key=lambda name: (len(self._by_caller[name]), name == caller))
            oldest = next(iter(self._by_caller[most]))
            self.end(most, oldest)
            oldest.end(_too_late(f"The body did not come while {self._uploads_max} requests waited for theirs. Send it again."))

    def make_room(self, size: int, now: float, asking: Transaction | None = None) -> int:
        """End uploads until so many bytes are let go of; returns how many are, 0 if the body of `asking` is to give way itself.

        Of the caller whose uploads hold most, the slowest ends first, in bytes a second since its request came; `now` is
        time.perf_counter's. What is let go of no longer counts as the transactions' own. None ends if all hold less than that.
        """
        chosen, freed = self._to_end(size, now), 0
        if any(transaction is asking for _, transaction in chosen):
            return 0
        for caller, transaction in chosen:
            freed += transaction.body_bytes
            transaction.body_bytes = 0
            self.end(caller, transaction)
            transaction.end(_too_late("The body came too slowly while others had no room for theirs. Send it again."))
        return freed

    def _to_end(self, size: int, now: float) -> list[tuple[str, Transaction]]:
        """Return the callers and uploads that have to give way for so many bytes, none if that is not enough."""

        def speed(transaction: Transaction) -> float:
            return transaction.body_bytes / max(now - transaction.came_at, RATE_SECONDS_MIN)

        holding = {
            caller: sorted((each for each in uploads if each.body_bytes), key=speed, reverse=True)
            for caller, uploads in self._by_caller.items()
        }
        held = {caller: sum([each.body_bytes for each in uploads]) for caller, uploads in holding.items()}
        if sum(held.values()) < size:
            return []
        chosen: list[tuple[str, Transaction]] = []
        while size > 0:
            most = max(held, key=held.__getitem__)
            slowest = holding[most].pop()
            chosen.append((most, slowest))
            held[most] -= slowest.body_bytes
            size -= slowest.body_bytes
        return chosen

    def went_on(self, caller: str, transaction: Transaction) -> None:
        """A part of the body has arrived."""
        uploads = self._by_caller.get(caller)
        if uploads is not None and transaction in uploads:
            uploads.move_to_end(transaction)

    def end(self, caller: str, transaction: Transaction) -> None:
        """This body is no longer awaited. Idempotent."""
        uploads = self._by_caller.get(caller)
        if uploads is None or transaction not in uploads:
            return
        del uploads[transaction]
        self._count -= 1
        if not uploads:
            del self._by_caller[caller]


def _too_late(why: str) -> InvalidRequest:
    return InvalidRequest(why, status=408, code="body_too_late")
