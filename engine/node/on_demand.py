"""Has this node's engines store blocks in host memory that another node asks for: those of GPUs, whose memory no agent reads.

An engine that is idle takes no steps, so it is asked by a request: for one token, of a prompt of one token, with a hint that
names the blocks (`transport/hint.py`). What came of it is seen in the tables. Nobody waits for the answer.
"""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from engine.fleet import FleetError, FleetSnapshot, ReplicaState
from transport.hint import STORE_MAX, Hint, write_hint
from transport.node.messages import NodeError
from transport.node.stored_blocks import Missing

_logger = logging.getLogger(__name__)

STORE_SECONDS_MAX = 2.0
"""What is not stored by then, asking for it included, is not sent: who waits takes longer for silence."""
LOOK_SECONDS = 0.005
AGAIN_SECONDS = 0.03
"""An engine learns that copies have ended with its next step: it is asked again, after twice as long each time."""
SEND_SECONDS_MAX = 0.5
ASKED_MAX = 8
"""Fetches for which one replica is asked at a time; a further one gets what is there."""
REFUSED_SECONDS = 10.0
"""A replica that stored nothing in time, or refused, is not asked again for so long."""
PROMPT = [0]


class OnDemand:
    """A `Storing`; `fleet` returns this node's replicas. Any thread may call."""

    def __init__(self, fleet: Callable[[], FleetSnapshot], clock: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: dict[str, int] = {}
        self._refused: dict[str, float] = {}

    def store(self, replica: str, missing: Missing) -> None:
        """As `Storing` has it."""
        wanted = missing()
        if not wanted or self._clock() < self._refused.get(replica, 0.0):
            return
        with self._turn(replica) as free:
            if not free:
                return
            left = self._wait(replica, wanted, missing)
        if len(left) == len(wanted):
            self._refuse(replica, f"stored none of {len(wanted)} blocks in {STORE_SECONDS_MAX:g} s")

    def _wait(self, replica: str, left: Sequence[int], missing: Missing) -> Sequence[int]:
        """Ask for what is missing until nothing is, or time is over; return what is missing then."""
        until, again, pause = self._clock() + STORE_SECONDS_MAX, self._clock(), AGAIN_SECONDS
        with contextlib.ExitStack() as asking:
            asked: list[socket.socket] = []
            while left and (now := self._clock()) < until:
                if now >= again:
                    asked.append(asking.enter_context(self._ask(replica, left, until - now)))
                    again, pause = now + pause, 2 * pause
                if words := _refusal(asked):
                    self._refuse(replica, words)
                    raise NodeError(f"{replica} {words}")
                time.sleep(LOOK_SECONDS)
                left = missing()
        return left

    def _ask(self, replica: str, blocks: Sequence[int], seconds: float) -> socket.socket:
        """Return the connection on which a replica was asked, within `seconds`. Raises NodeError."""
        try:
            with self._lock:
                fleet = self._fleet()
        except FleetError as error:
            raise NodeError(f"{replica}: {error}") from error
        found = fleet.find(replica)
        if found is None or found.state not in (ReplicaState.READY, ReplicaState.DRAINING):
            raise NodeError(f"{replica} takes no requests")
        try:
            return _sent(found.socket, _request(fleet.served_model_name, blocks[:STORE_MAX]), min(seconds, SEND_SECONDS_MAX))
        except OSError as error:
            self._refuse(replica, f"cannot be asked: {error}")
            raise NodeError(f"{replica}: {error}") from error

    def _refuse(self, replica: str, words: str) -> None:
        _logger.info("%s is asked to store nothing for %g s: it %s", replica, REFUSED_SECONDS, words)
        self._refused[replica] = self._clock() + REFUSED_SECONDS

    @contextmanager
    def _turn(self, replica: str) -> Iterator[bool]:
        with self._lock:
            free = self._asked.get(replica, 0) < ASKED_MAX
            self._asked[replica] = self._asked.get(replica, 0) + free
        try:
            yield free
        finally:
            with self._lock:
                self._asked[replica] -= free


def _sent(path: str, request: bytes, seconds: float) -> socket.socket:
    """Return a connection to a unix socket on which a request was sent, within `seconds` in all. Raises OSError."""
    until = time.monotonic() + seconds
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(seconds)
        connection.connect(path)
        connection.settimeout(max(until - time.monotonic(), LOOK_SECONDS))
        connection.sendall(request)
        connection.setblocking(False)  # whoever looks for an answer waits for none
    except OSError:
        connection.close()
        raise
    return connection


def _request(model: str, blocks: Sequence[int]) -> bytes:
    hint = write_hint(Hint(source="", store=tuple(blocks)))
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": hint}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: peerkv\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"{head}\r\nconnection: close\r\n\r\n".encode() + body


def _refusal(asked: Sequence[socket.socket]) -> str:
    """Return what a replica answered if it does not do what it was asked; "" while it may."""
    for connection in asked:
        try:
            said = connection.recv(64, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        except OSError as error:
            return f"ended the connection: {error}"
        if said.partition(b" ")[2][:3] not in (b"", b"200"):
            return f"answered {said.partition(b' ')[2][:3].decode(errors='replace')}"
    return ""
