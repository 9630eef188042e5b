"""How long a client is willing to wait for the first byte of its answer: the header x-request-timeout."""

from __future__ import annotations

import re
import time

from gateway.errors import DeadlinePassed, InvalidRequest
from gateway.http_server.transaction import Transaction

_SECONDS = re.compile(rb"[0-9]{1,9}(\.[0-9]{1,9})?")


def timeout_of(value: bytes | None) -> float | None:
    """The seconds in a header x-request-timeout; None without one. Raises InvalidRequest."""
    if value is None:
        return None
    if _SECONDS.fullmatch(value) is None or not (seconds := float(value)):
        raise InvalidRequest("The header 'x-request-timeout' must be a number of seconds above 0, such as 5 or 0.5.")
    return seconds


def seconds_left(patience: float | None, transaction: Transaction) -> float | None:
    """What is left of it, the time counted from the request's arrival; None without an end."""
    return None if patience is None else max(0.0, transaction.came_at + patience - time.perf_counter())


def wait_for_replicas(patience: float | None, transaction: Transaction) -> None:
    """The request is about to go to a replica: from now on it ends when its time is over, unless its answer has begun."""
    if patience is not None:
        transaction.begin_within(seconds_left(patience, transaction) or 0.0, DeadlinePassed(patience))
