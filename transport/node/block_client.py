"""Fetches blocks from other nodes: a few connections to each, kept open, one fetch at a time on each."""

import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transport.node.block_fetcher import FETCH_SECONDS_MAX, Fetched
from transport.node.messages import BlocksAsked, BlocksSent, CheckAsked, Hello, MemoryAsked, Message, NodeError, Welcome, encode
from transport.node.sockets import FellSilent, Wire, call
from transport.node.staging import Piece

IDLE_MAX = 8
"""Connections to a node that are kept for the next fetch."""


class BlockClient:
    """A BlockFetcher that asks `node` at `address`, as the node `here`, which has this version of `nixl`, "" for none."""

    def __init__(
        self, node: str, address: tuple[str, int], context: ssl.SSLContext | None, here: str, release: str, nixl: str = ""
    ) -> None:
        self.node = node
        self._address = address
        self._context = context
        self._hello = Hello(here, "blocks", release=release, nixl=nixl)
        self._idle: deque[Wire] = deque()
        self._busy: set[Wire] = set()
        self._lock = threading.Lock()
        self._closed = False

    def fetch(self, asked: BlocksAsked, sizes: Sequence[int], target: Piece) -> Fetched:
        """As BlockFetcher has it; what is not good is left as it is, and after FETCH_SECONDS_MAX what came is good."""
        wire, first = self._asked(asked)
        good = np.zeros(len(sizes), np.bool_)
        try:
            reason = self._receive(wire, first, sizes, good, target.rows)
        except NodeError as error:
            self._forget(wire)
            if good.any():
                return Fetched(good, str(error), error.loss)
            raise
        self._keep(wire)
        return Fetched(good, reason)

    def ask(self, message: MemoryAsked | CheckAsked) -> Message:
        """Return what is answered. Raises NodeError."""
        wire, answer = self._asked(message)
        self._keep(wire)
        return answer

    def greet(self) -> Welcome:
        """Return how the node welcomes us now. Raises NodeError."""
        wire = self._called()
        self._keep(wire)
        assert wire.welcomed is not None
        return wire.welcomed

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            self._closed = True
            idle = list(self._idle)
            self._idle.clear()
            for wire in self._busy:
                wire.break_off()  # its fetch closes it
        for wire in idle:
            wire.close()

    def _asked(self, question: Message) -> tuple[Wire, Message]:
        """Return the first message of an answer, and the connection on which it came. Raises NodeError."""
        wire, fresh = self._wire()
        until = time.monotonic() + FETCH_SECONDS_MAX
        try:
            return wire, self._exchange(wire, question, until)
        except NodeError as error:
            self._forget(wire)
            if fresh or isinstance(error, FellSilent):
                raise
        wire = self._called()  # the other had been closed while it was idle
        try:
            return wire, self._exchange(wire, question, until)
        except NodeError:
            self._forget(wire)
            raise

    def _exchange(self, wire: Wire, question: Message, until: float) -> Message:
        wire.until = until
        wire.send(encode(question))
        return wire.receive()

    def _receive(
        self, wire: Wire, sent: object, sizes: Sequence[int], good: npt.NDArray[np.bool_], target: npt.NDArray[np.uint8]
    ) -> str:
        done, scratch = 0, np.empty(0, np.uint8)
        while isinstance(sent, BlocksSent) and not sent.last:
            count, size = len(sent.good), sent.bytes
            if not count or done + count > len(good) or any(each != size for each in sizes[done : done + count]):
                raise NodeError(f"{self.node} sends blocks that nobody asked for")
            if len(scratch) < count * size:
                scratch = np.empty(count * size, np.uint8)
            wire.read_into(scratch.data[: count * size])
            came = np.frombuffer(sent.good, np.uint8) == 1
            rows = scratch[: count * size].reshape(count, size)
            if came.all():
                target[done : done + count, :size] = rows
            else:
                target[np.flatnonzero(came) + done, :size] = rows[came]
            good[done : done + count] = came
            done += count
            sent = wire.receive()
        if not isinstance(sent, BlocksSent):
            raise NodeError(f"{self.node} answers something else")
        if not sent.reason and not good.all():
            return f"{int((~good).sum())} blocks were reallocated before they were read"
        return sent.reason

    def _wire(self) -> tuple[Wire, bool]:
        """Return a connection, and whether it was made for this."""
        with self._lock:
            if self._closed:
                raise NodeError(f"{self.node} is not asked any more")
            if self._idle:
                wire = self._idle.pop()
                self._busy.add(wire)
                return wire, False
        return self._called(), True

    def _called(self) -> Wire:
        wire = call(self._address, self.node, self._context, self._hello)
        with self._lock:
            self._busy.add(wire)
            if self._closed:
                wire.break_off()
        return wire

    def _keep(self, wire: Wire) -> None:
        with self._lock:
            self._busy.discard(wire)
            if not self._closed and len(self._idle) < IDLE_MAX:
                self._idle.append(wire)
                return
        wire.close()

    def _forget(self, wire: Wire) -> None:
        with self._lock:
            self._busy.discard(wire)
        wire.close()
