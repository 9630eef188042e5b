"""Comments to clients that wait for a stream's first event: proxies give up connections that are silent for a long prefill."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

from gateway.http_server.transaction import Transaction

COMMENT = b": keep-alive\n\n"
HEAD_LINES = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
"""The head leaves with the first comment. Whatever the replica says then, even an error, comes as an event."""


class KeepAlive:
    """Looks after `transactions`, those of the relay. A comment begins nothing: another replica may still give the answer."""

    def __init__(self, seconds: float, transactions: Collection[Transaction]) -> None:
        """`seconds` between comments; 0: none are sent."""
        self._seconds = seconds
        self._transactions = transactions

    def waits(self, transaction: Transaction) -> None:
        """The request is about to be sent to a replica, and is to be answered by a stream."""
        if self._seconds:
            transaction.quiet_since = time.perf_counter()

    def look(self, now: float) -> None:
        """Send what is due; `now` is of time.perf_counter."""
        for transaction in tuple(self._transactions):
            since = transaction.quiet_since
            if since is not None and now - since >= self._seconds and not (transaction.begun or transaction.left):
                transaction.quiet_since = now
                transaction.comment(200, HEAD_LINES, COMMENT)

    async def run(self) -> None:
        """Look from time to time, for ever; end at once if nothing is to be sent."""
        while self._seconds:
            await asyncio.sleep(self._seconds / 4)
            self.look(time.perf_counter())
