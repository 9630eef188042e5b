"""One connection to a Valkey server, blocking, with a deadline for each call as a whole.

It speaks as much of RESP2 as a cache of frames takes. Libraries bound the wait for each packet, so a server that sends a byte
now and then holds them for ever; and they copy each value several times, which costs most of the speed.
"""

import socket
import ssl
import time
from collections.abc import Callable, Sequence

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.resp import (
    Reply,
    VaultError,
    VaultGone,
    Word,
    hello,
    items_count,
    number,
    pieces,
    value_size,
)

LINE_BYTES_MAX = 4096
_BUFFER_BYTES = 1 << 16
_LATE = "no answer in time"


class VaultLate(VaultGone):
    """The deadline came first."""


class Connection:
    """Not thread safe. Raises VaultGone, also for a server that lets us not in."""

    def __init__(self, address: VaultAddress, context: ssl.SSLContext | None, deadline: float) -> None:
        self._buffer = bytearray(_BUFFER_BYTES)
        self._begin = self._end = 0
        try:
            plain = socket.create_connection((address.host, address.port), timeout=_left(deadline))
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket = plain if context is None else context.wrap_socket(plain, server_hostname=address.host)
        except TimeoutError as error:
            raise VaultLate(_LATE) from error
        except (OSError, ValueError) as error:
            raise VaultGone(f"no connection: {error}") from error
        try:
            first = hello(address)
            for reply in self.call(first, deadline) if first else ():
                if isinstance(reply, VaultError):
                    raise VaultGone(str(reply))
        except VaultGone:
            self.close()
            raise

    def call(self, commands: Sequence[Sequence[Word]], deadline: float) -> list[Reply]:
        """Send commands at once, and return their replies. Raises VaultGone."""
        try:
            self._send(commands, deadline)
            return [self._reply(deadline) for _ in commands]
        except TimeoutError as error:
            raise VaultLate(_LATE) from error
        except OSError as error:
            raise VaultGone(f"the connection broke: {error}") from error

    def fetch(self, keys: Sequence[bytes], take: Callable[[int, memoryview], None], deadline: float) -> None:
        """Ask for values in one round trip; call `take` with the place and the value of each that is there, as they come.

        A value is gone when `take` returns. Raises VaultGone, VaultError.
        """
        try:
            self._send([[b"MGET", *keys]], deadline)
            line = self._line(deadline)
            if line.startswith(b"-"):
                raise VaultError(line[1:].decode("utf-8", "replace"))
            if line != b"*%d" % len(keys):
                raise VaultGone("the answer is none to what was asked")
            room = bytearray()
            for place in range(len(keys)):
                size = self._size(self._line(deadline))
                if size is None:
                    continue
                if len(room) < size + 2:
                    room = bytearray(size + 2)
                value = memoryview(room)[: size + 2]
                self._fill(value, deadline)
                if bytes(value[size:]) != b"\r\n":
                    raise VaultGone("a value that is longer than it says")
                take(place, value[:size])
        except TimeoutError as error:
            raise VaultLate(_LATE) from error
        except OSError as error:
            raise VaultGone(f"the connection broke: {error}") from error

    def close(self) -> None:
        """Close it."""
        try:
            self._socket.close()
        except OSError:  # it was of no use any more
            return

    # Inside

    def _send(self, commands: Sequence[Sequence[Word]], deadline: float) -> None:
        small: list[Word] = []
        for piece in (piece for words in commands for piece in pieces(words)):
            if len(piece) < _BUFFER_BYTES:
                small.append(piece)
                continue
            self._send_all(b"".join(small), deadline)
            small = []
            self._send_all(piece, deadline)
        self._send_all(b"".join(small), deadline)

    def _send_all(self, data: Word, deadline: float) -> None:
        view = memoryview(data)
        while len(view):
            self._socket.settimeout(_left(deadline))
            view = view[self._socket.send(view) :]

    def _receive(self, into: memoryview, deadline: float) -> int:
        self._socket.settimeout(_left(deadline))
        got = self._socket.recv_into(into)
        if not got:
            raise VaultGone("the server closed the connection")
        return got

    def _fill(self, into: memoryview, deadline: float) -> None:
        """Fill it from what was received already, then straight from the socket."""
        ready = min(len(into), self._end - self._begin)
        into[:ready] = memoryview(self._buffer)[self._begin : self._begin + ready]
        self._begin += ready
        while ready < len(into):
            ready += self._receive(into[ready:], deadline)

    def _line(self, deadline: float) -> bytes:
        while True:
            end = self._buffer.find(b"\r\n", self._begin, self._end)
            if end >= 0:
                line = bytes(self._buffer[self._begin : end])
                self._begin = end + 2
                return line
            if self._end - self._begin > LINE_BYTES_MAX:
                raise VaultGone("an answer that is none")
            if self._begin:
                left = self._buffer[self._begin : self._end]
                self._buffer[: len(left)] = left
                self._begin, self._end = 0, len(left)
            self._end += self._receive(memoryview(self._buffer)[self._end :], deadline)

    def _size(self, line: bytes) -> int | None:
        """The size of the value whose head this is, None where there is none."""
        if line.startswith(b"$"):
            return value_size(line[1:])
        raise VaultGone("an answer that is none")

    def _reply(self, deadline: float, depth: int = 0) -> Reply:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return VaultError(rest.decode("utf-8", "replace"))
        if kind == b"$":
            size = self._size(line)
            if size is None:
                return None
            value = bytearray(size + 2)
            self._fill(memoryview(value), deadline)
            return bytes(value[:size])
        if kind == b":":
            return number(rest)
        if kind == b"*":
            return [self._reply(deadline, depth + 1) for _ in range(items_count(rest, depth))]
        raise VaultGone("an answer that is none")


def _left(deadline: float) -> float:
    """Seconds until the deadline. Raises VaultGone when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise VaultLate(_LATE)
    return left
