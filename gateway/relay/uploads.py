"""Requests whose bodies still come: bounded apart from those that are served, which heads without bodies cost nothing."""

from __future__ import annotations

from collections import OrderedDict

from gateway.errors import InvalidRequest
from gateway.http_server.transaction import Transaction


class Uploads:
    """At most `uploads_max`. Of more, one ends: of the caller who has most, the one of which nothing came for longest.

    So who has a body to send gets a place whatever others hold back, and a caller's excess costs that caller alone. Belongs to
    one event loop.
    """

    def __init__(self, uploads_max: int) -> None:
        self._uploads_max = uploads_max
        self._count = 0
        self._by_caller: dict[str, OrderedDict[Transaction, None]] = {}  # in the order in which something came of them

    def __len__(self) -> int:
        return self._count

    def begin(self, caller: str, transaction: Transaction) -> None:
        """The body of this caller's request is waited for."""
        self._by_caller.setdefault(caller, OrderedDict())[transaction] = None
        self._count += 1
        if self._count > self._uploads_max:
            most = max(self._by_caller, key=lambda name: (len(self._by_caller[name]), name == caller))
            oldest = next(iter(self._by_caller[most]))
            self.end(most, oldest)
            why = f"The body did not come while {self._uploads_max} requests waited for theirs. Send it again."
            oldest.end(InvalidRequest(why, status=408, code="body_too_late"))

    def went_on(self, caller: str, transaction: Transaction) -> None:
        """A part of the body came."""
        uploads = self._by_caller.get(caller)
        if uploads is not None and transaction in uploads:
            uploads.move_to_end(transaction)

    def end(self, caller: str, transaction: Transaction) -> None:
        """Nobody waits for this body any more. Idempotent."""
        uploads = self._by_caller.get(caller)
        if uploads is None or transaction not in uploads:
            return
        del uploads[transaction]
        self._count -= 1
        if not uploads:
            del self._by_caller[caller]
