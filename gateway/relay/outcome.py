"""What became of a request, and of one attempt to serve it."""

from __future__ import annotations

import time

from gateway.http_server.transaction import Transaction
from gateway.ledger.ledger import LEFT_STATUS
from gateway.relay.answer import Answer
from gateway.relay.request_record import RequestRecord


def finish(record: RequestRecord, transaction: Transaction) -> None:
    """The request is over."""
    came_at, status = transaction.came_at, transaction.status
    record.request_id = transaction.request_id
    record.status = LEFT_STATUS if transaction.left else status
    record.first_byte_seconds = transaction.begun_at - came_at if status else None
    record.ended_at = time.perf_counter()
    record.seconds = record.ended_at - came_at


def outcome(transaction: Transaction, answer: Answer | None, lost: int) -> int:
    """The status of an attempt: its answer's, or that of the error that ended it."""
    if transaction.left:
        return LEFT_STATUS
    if answer is not None:
        return answer.status
    return transaction.status if transaction.begun else lost
