"""HTTP to the replicas over their unix sockets: a pool of connections to each.

What a dead, dying or silent replica does becomes `UpstreamLost`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from engine.fleet import Replica
from gateway.errors import GatewayError, ReplicaTooSlow
from gateway.settings import Settings
from gateway.upstream.connection import ConnectionBroke, EngineConnection

CONTROL_ANSWER_BYTES_MAX = 64 << 20


class UpstreamLost(GatewayError):
    """The connection to a replica failed or broke; `connected` says whether there was one."""

    def __init__(self, message: str, *, connected: bool) -> None:
        super().__init__(message)
        self.connected = connected


class Upstream:
    """Connections to the replicas, by socket. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._idle: dict[str, list[EngineConnection]] = {}
        self._busy: set[EngineConnection] = set()

    def post(self, replica: Replica, path: str, lines: bytes, payload: Sequence[bytes]) -> Awaitable[EngineConnection]:
        """Send the request and return the connection when the answer's head is there; the caller gives it to `release`.

        `lines` are the request's headers as they are sent, but for its length.

        A connection from the pool may have been closed by the replica a moment ago, which shows only when it is used.
        So a connection that breaks before the head is tried once more, on a new one. The replica may then compute the request
        twice, which costs time and nothing else: an answer is all that a request leaves. Raises UpstreamLost, ReplicaTooSlow.
        """
        size = sum(map(len, payload))
        exchange = self._exchange(replica, _head("POST", path, lines, size), payload, size)
        seconds = self._settings.response_head_seconds_max
        return exchange if seconds is None else _within(seconds, exchange)

    async def _exchange(self, replica: Replica, head: bytes, payload: Sequence[bytes], size: int) -> EngineConnection:
        connection = self._pooled(replica) or await self._connect(replica)
        is_second = False
        while True:
            self._busy.add(connection)
            try:
                await connection.send(head, payload, size)
                return connection
            except BaseException as error:
                self._busy.discard(connection)
                connection.close()
                if not isinstance(error, ConnectionBroke):
                    raise
                if is_second:
                    raise broken(replica, error) from error
            connection = await self._connect(replica)
            is_second = True

    def _pooled(self, replica: Replica) -> EngineConnection | None:
        """The connection that was used last; those that idle too long are closed."""
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

    async def _connect(self, replica: Replica) -> EngineConnection:
        loop = asyncio.get_running_loop()
        idle = self._idle.setdefault(replica.socket, [])

        def lost(connection: EngineConnection) -> None:
            if connection in idle:
                idle.remove(connection)

        try:
            async with asyncio.timeout(self._settings.connect_seconds):
                _, made = await loop.create_unix_connection(lambda: EngineConnection(loop, lost), replica.socket)
        except (OSError, TimeoutError) as error:
            raise UpstreamLost(f"{replica.name}: {type(error).__name__}: {error}", connected=False) from error
        return made

    def release(self, replica: Replica, connection: EngineConnection) -> None:
        """Keep a connection whose answer was read to its end for the next request; close any other."""
        self._busy.discard(connection)
        if connection.reusable:
            connection.reset(time.monotonic())
            self._idle.setdefault(replica.socket, []).append(connection)
        else:
            connection.close()

    async def get_bytes(self, replica: Replica, path: str) -> bytes:
        """The body of a control call's 200 answer. Raises UpstreamLost, also for any other status."""
        return await self._control(replica, path, _head("GET", path, b"", None))

    async def post_control(self, replica: Replica, path: str, query: Mapping[str, str]) -> bytes:
        """The body of the 200 answer to a POST without a body. Raises UpstreamLost, also for any other status."""
        return await self._control(replica, path, _head("POST", f"{path}?{urlencode(query)}", b"", 0))

    async def post_json(self, replica: Replica, path: str, payload: bytes, seconds_max: float) -> tuple[int, bytes]:
        """The status and body of the answer to a JSON POST. Raises UpstreamLost, also when it takes longer."""
        head = _head("POST", path, b"content-type: application/json\r\n", len(payload))
        return await self._whole_answer(replica, path, head, payload, seconds_max)

    async def _control(self, replica: Replica, path: str, head: bytes) -> bytes:
        status, content = await self._whole_answer(replica, path, head, b"", self._settings.control_seconds)
        if status != 200:
            raise UpstreamLost(f"{replica.name} answered {status} to {path}", connected=True)
        return content

    async def _whole_answer(
        self, replica: Replica, path: str, head: bytes, payload: bytes, seconds_max: float
    ) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(seconds_max):
                connection = await self._exchange(replica, head, [payload], len(payload))
                try:
                    return connection.head.status, await _whole(connection)
                except ConnectionBroke as error:
                    raise broken(replica, error) from error
                finally:
                    self.release(replica, connection)
        except TimeoutError as error:
            text = f"{replica.name} did not answer {path} within {seconds_max:g} s"
            raise UpstreamLost(text, connected=True) from error

    async def close(self) -> None:
        """Close all connections."""
        for connection in [*self._busy, *(idle for pool in self._idle.values() for idle in pool)]:
            connection.close()
        self._idle.clear()


async def _whole(connection: EngineConnection) -> bytes:
    parts = bytearray()
    while part := await connection.read():
        parts += part
        if len(parts) > CONTROL_ANSWER_BYTES_MAX:
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


def broken(replica: Replica, error: ConnectionBroke) -> UpstreamLost:
    """What a connection that breaks is to the callers."""
    return UpstreamLost(f"{replica.name}: {error}", connected=True)
