"""Blocking sockets for the bytes of blocks: every call has a deadline, and what is read is read in whole.

Beside a busy interpreter a loop of small reads takes six times as long as one call for all of them (MSG_WAITALL). TLS reads by
records; there the loop is in our hands.
"""

import contextlib
import socket
import ssl
import struct
import time
from math import inf

from transport.node.hello import answer_to, check_reached, check_welcome
from transport.node.messages import LENGTH_BYTES, Hello, Message, NodeError, Refused, Welcome, body_bytes, decode, encode
from transport.node.nixl.ability import NO_NIXL, Ability

CONNECT_SECONDS = 3.0
PROGRESS_SECONDS = 3.0
"""The longest time without a byte: whoever is silent for longer is given up."""


_TIMEVAL = struct.Struct("@ll")


class FellSilent(NodeError):
    """Nothing came for as long as is waited: who is there may be stopped, and another connection would wait as long."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "silent")


class Wire:
    """A connection. Raises NodeError for whatever happens to it."""

    def __init__(self, connection: socket.socket) -> None:
        self.welcomed: Welcome | None = None
        """What was said when we called."""
        self.until = inf
        """When reading ends, however much comes: a node that sends a byte now and then would hold us for ever."""
        self._socket = connection
        self._plain = not isinstance(connection, ssl.SSLSocket)
        self.wait(None)

    def send(self, *parts: bytes | memoryview) -> None:
        """Send all parts, one after the other."""
        try:
            for part in parts:
                self._socket.sendall(part)
        except OSError as error:
            raise NodeError(f"sending: {error}") from error

    def read_into(self, target: memoryview) -> None:
        """Fill `target`."""
        flags = socket.MSG_WAITALL if self._plain else 0
        try:
            while target:
                if time.monotonic() > self.until:
                    raise NodeError("it takes too long", "slow")
                count = self._socket.recv_into(target, 0, flags)
                if not count:
                    raise NodeError("the connection ended")
                target = target[count:]
        except (TimeoutError, BlockingIOError) as error:
            raise FellSilent(f"reading: {error}") from error
        except OSError as error:
            raise NodeError(f"reading: {error}") from error

    def receive(self) -> Message:
        """Return the next message."""
        head = bytearray(LENGTH_BYTES)
        self.read_into(memoryview(head))
        body = bytearray(body_bytes(bytes(head)))
        self.read_into(memoryview(body))
        return decode(body)

    def wait(self, seconds: float | None) -> None:
        """Let the next call wait so long for its first byte; `None` for the usual time."""
        limit = PROGRESS_SECONDS if seconds is None else seconds
        if not self._plain:  # what is without a time-out for Python, TLS reads again and again, whatever the kernel's is
            self._socket.settimeout(limit)
            return
        self._socket.settimeout(None)  # Python waits with poll(2) for each read otherwise, and MSG_WAITALL waits for nothing
        value = _TIMEVAL.pack(int(limit), int(limit % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, value)

    def break_off(self) -> None:
        """End it from any thread: whoever is in a call on it gets a NodeError, and closes it."""
        break_off(self._socket)

    def close(self) -> None:
        """Close; for the thread that uses it."""
        break_off(self._socket)
        self._socket.close()


def break_off(connection: socket.socket) -> None:
    """End a connection that another thread may be in a call on.

    Below TLS: `SSLSocket.shutdown` and `close` take the TLS off first, and that thread would go on in the clear: what it reads
    then is ciphertext, which it would take for blocks, and what it sends can be read by everybody.
    """
    with contextlib.suppress(OSError):  # it has ended already
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def call(address: tuple[str, int], node: str, context: ssl.SSLContext | None, hello: Hello) -> Wire:
    """Return a connection to `node` that was welcomed. Raises NodeError."""
    where = f"{node} at {address[0]}:{address[1]}"
    try:
        connection = socket.create_connection(address, CONNECT_SECONDS)
    except OSError as error:
        raise NodeError(f"{where}: {error}", "silent" if isinstance(error, TimeoutError) else "failed") from error
    try:
        check_reached(connection.getpeername()[0], context)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            connection = context.wrap_socket(connection, server_hostname=node)
        wire = Wire(connection)
        wire.send(encode(hello))
        wire.welcomed = check_welcome(wire.receive(), node)
    except (OSError, NodeError) as error:
        connection.close()
        silent = isinstance(error, FellSilent | TimeoutError)
        raise NodeError(f"{where}: {error}", "silent" if silent else "failed") from error
    return wire


def welcome(connection: socket.socket, here: str, release: str, nixl: Ability = NO_NIXL) -> tuple[Wire, Hello]:
    """Return a connection that somebody made to us, once it was welcomed. Raises NodeError; the caller closes `connection`."""
    wire = Wire(connection)
    tls = connection if isinstance(connection, ssl.SSLSocket) else None
    hello, answer = answer_to(wire.receive(), tls, here, release, nixl)
    wire.send(encode(answer))
    if isinstance(answer, Refused):
        raise NodeError(answer.reason)
    return wire, hello
