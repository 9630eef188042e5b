"""HTTP to the replicas over their unix sockets: a pool of connections to each.

What a dead, dying or silent replica does becomes `UpstreamLost`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Mapping
from typing import Any, Protocol
from urllib.parse import urlencode

from engine.fleet import Replica
from gateway.errors import GatewayError, ReplicaTooSlow
from gateway.settings import Settings
from gateway.upstream.connection import ConnectionBroke, EngineConnection, Payload
from transport.errors import SHORTAGES

CONTROL_ANSWER_BYTES_MAX = 64 << 20


SHORTAGE_PAUSE_SECONDS = 0.05


class UpstreamLost(GatewayError):
    """The connection to a replica failed or broke. `sent`: the request may have reached it. `given_up`: by us, it lives."""

    def __init__(self, message: str, *, sent: bool, given_up: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.given_up = given_up


class LocalShortage(UpstreamLost):
    """No descriptor or memory was left in this process: it says nothing about the replica."""


class Waiting(Protocol):
    """A request that waits for its answer: once that has `begun`, it can no longer come from another replica."""

    @property
    def begun(self) -> bool: ...


class Upstream:
    """Connections to the replicas, by socket. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._idle: dict[str, list[EngineConnection]] = {}
        self._busy: dict[EngineConnection, tuple[str, Waiting | None]] = {}

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self._settings = settings

    def post(
        self, replica: Replica, path: str, lines: bytes, payload: Payload, waiting: Waiting | None = None
    ) -> Awaitable[EngineConnection]:
        """Send the request and return the connection when the answer's head is there; the caller gives it to `release`.

        `lines` are the request's headers as they are sent, but for its length.

        `waiting` is who can be told to ask another replica, see `give_up`.

        A connection from the pool may have been closed by the replica a moment ago, which shows only when it is used.
        So one that breaks before the head is tried once more, on a new one; that one is not: the request may be what broke it.
        The replica may then compute the request twice, which costs time and nothing else: an answer is all that a request
        leaves. Raises UpstreamLost, ReplicaTooSlow.
        """
        size = sum(map(len, payload))
        exchange = self._exchange(replica, _head("POST", path, lines, size), payload, size, waiting)
        seconds = self._settings.response_head_seconds_max
        return exchange if seconds is None else _within(seconds, exchange)

    async def _exchange(
        self, replica: Replica, head: bytes, payload: Payload, size: int, waiting: Waiting | None
    ) -> EngineConnection:
        pooled = self._pooled(replica)
        connection = pooled or await self._connect(replica, sent=False)
        while True:
            self._busy[connection] = (replica.name, waiting)
            try:
                await connection.send(head, payload, size)
                return connection
            except BaseException as error:
                del self._busy[connection]
                connection.close()
                if not isinstance(error, ConnectionBroke):
                    raise
                if connection is not pooled or connection.given_up:
                    raise broken(replica, error, connection) from error
            connection = await self._connect(replica, sent=True)

    def _pooled(self, replica: Replica) -> EngineConnection | None:
        """The connection that was used most recently; those that were idle for too long are closed."""
        idle = self._idle.get(replica.socket)
        if not idle:
            return None
        connection = idle.pop()
        if time.monotonic() - connection.idle_since <= self._settings.upstream_idle_seconds:
            return connection
        connection.close()
        for older in idle:
            older.close()
        idle.clear()
        return None

    async def _connect(self, replica: Replica, *, sent: bool) -> EngineConnection:
        """A new connection; `sent`: the request was sent on another one before. Raises UpstreamLost."""
        loop = asyncio.get_running_loop()
        idle = self._idle.setdefault(replica.socket, [])

        def lost(connection: EngineConnection) -> None:
            if connection in idle:
                idle.remove(connection)

        shortage: OSError | None = None
        try:
            async with asyncio.timeout(self._settings.connect_seconds):
                while True:
                    try:
                        _, made = await loop.create_unix_connection(lambda: EngineConnection(loop, lost), replica.socket)
                        return made
                    except OSError as error:
                        if error.errno not in SHORTAGES:
                            raise
                        shortage = error
                    self._close_idle()
                    await asyncio.sleep(SHORTAGE_PAUSE_SECONDS)
        except (OSError, TimeoutError) as error:
            if shortage is not None and isinstance(error, TimeoutError):
                raise LocalShortage(f"{replica.name}: {shortage}", sent=sent) from shortage
            raise UpstreamLost(f"{replica.name}: {type(error).__name__}: {error}", sent=sent) from error

    def _close_idle(self) -> None:
        for pool in self._idle.values():
            for connection in tuple(pool):
                connection.close()
            pool.clear()

    def give_up(self, name: str, why: str) -> int:
        """Have requests that wait for the replica `name`, without a byte of an answer, ask another one. Returns how many."""
        found = [each for each, (at, who) in self._busy.items() if at == name and who is not None and not who.begun]
        for connection in found:
            connection.give_up(why)
        return len(found)

    def release(self, replica: Replica, connection: EngineConnection) -> None:
        """Keep a connection whose answer was read to its end for the next request; close any other."""
        self._busy.pop(connection, None)
        if connection.reusable:
            connection.reset(time.monotonic())
            self._idle.setdefault(replica.socket, []).append(connection)
        else:
            connection.close()

    async def get_bytes(
        self, replica: Replica, path: str, *, seconds_max: float | None = None, bytes_max: int = CONTROL_ANSWER_BYTES_MAX
    ) -> bytes:
        """The body of a control call's 200 answer. Raises UpstreamLost, also for any other status, or when it takes longer
        than `seconds_max` (control_seconds if that is None) or is larger."""
        return await self._control(replica, path, _head("GET", path, b"", None), seconds_max, bytes_max)

    async def post_control(self, replica: Replica, path: str, query: Mapping[str, str]) -> bytes:
        """The body of the 200 answer to a POST without a body. Raises UpstreamLost, also for any other status."""
        return await self._control(replica, path, _head("POST", f"{path}?{urlencode(query)}", b"", 0))

    async def post_json(self, replica: Replica, path: str, payload: bytes, seconds_max: float) -> tuple[int, bytes]:
        """The status and body of the answer to a JSON POST. Raises UpstreamLost, also when it takes longer."""
        head = _head("POST", path, b"content-type: application/json\r\n", len(payload))
        return await self._whole_answer(replica, path, head, payload, seconds_max)

    async def _control(
        self,
        replica: Replica,
        path: str,
        head: bytes,
        seconds_max: float | None = None,
        bytes_max: int = CONTROL_ANSWER_BYTES_MAX,
    ) -> bytes:
        seconds = self._settings.control_seconds if seconds_max is None else seconds_max
        status, content = await self._whole_answer(replica, path, head, b"", seconds, bytes_max)
        if status != 200:
            raise UpstreamLost(f"{replica.name} answered {status} to {path}", sent=True)
        return content

    async def _whole_answer(
        self,
        replica: Replica,
        path: str,
        head: bytes,
        payload: bytes,
        seconds_max: float,
        bytes_max: int = CONTROL_ANSWER_BYTES_MAX,
    ) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(seconds_max):
                connection = await self._exchange(replica, head, [payload], len(payload), None)
                try:
                    return connection.head.status, await _whole(connection, bytes_max)
                except ConnectionBroke as error:
                    raise broken(replica, error, connection) from error
                finally:
                    self.release(replica, connection)
        except TimeoutError as error:
            text = f"{replica.name} did not answer {path} within {seconds_max:g} s"
            raise UpstreamLost(text, sent=True) from error

    async def close(self) -> None:
        """Close all connections."""
        for connection in [*self._busy, *(idle for pool in self._idle.values() for idle in pool)]:
            connection.close()
        self._idle.clear()


async def _whole(connection: EngineConnection, bytes_max: int) -> bytes:
    parts = bytearray()
    while part := await connection.read():
        parts += part
        if len(parts) > bytes_max:
            raise ConnectionBroke("the answer is too long")
    return bytes(parts)


def _head(method: str, path: str, lines: bytes, length: int | None) -> bytes:
    start = b"%b %b HTTP/1.1\r\nhost: localhost\r\n%b" % (method.encode(), path.encode(), lines)
    return start + b"\r\n" if length is None else b"%bcontent-length: %d\r\n\r\n" % (start, length)


async def _within(seconds: float, exchange: Coroutine[Any, Any, EngineConnection]) -> EngineConnection:
    try:
        async with asyncio.timeout(seconds):
            return await exchange
    except TimeoutError:
        raise ReplicaTooSlow(seconds) from None


def broken(replica: Replica, error: ConnectionBroke, connection: EngineConnection) -> UpstreamLost:
    """A broken connection as the error that callers see."""
    return UpstreamLost(f"{replica.name}: {error}", sent=True, given_up=connection.given_up)
