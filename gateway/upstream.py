"""HTTP to the replicas over their unix sockets: a pool of connections to each.

What a dead, dying or silent replica does becomes `UpstreamLost`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

from engine.fleet import Replica
from gateway.engine_connection import ConnectionBroke, EngineConnection
from gateway.errors import GatewayError, ReplicaTooSlow
from gateway.settings import Settings

Headers = Sequence[tuple[bytes, bytes]]
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

    async def post(self, replica: Replica, path: str, payload: Sequence[bytes], headers: Headers) -> EngineConnection:
        """Send the request and return the connection when the answer's head is there; the caller gives it to `release`.

        A connection from the pool may have been closed by the replica a moment ago, which shows only when it is used.
        So a connection that breaks before the head is tried once more, on a new one. The replica may then compute the request
        twice, which costs time and nothing else: an answer is all that a request leaves. Raises UpstreamLost, ReplicaTooSlow.
        """
        head = _head("POST", path, headers, sum(map(len, payload)))
        seconds = self._settings.response_head_seconds_max
        if seconds is None:
            return await self._exchange(replica, head, payload)
        try:
            async with asyncio.timeout(seconds):
                return await self._exchange(replica, head, payload)
        except TimeoutError:
            raise ReplicaTooSlow(seconds) from None

    async def _exchange(self, replica: Replica, head: bytes, payload: Sequence[bytes]) -> EngineConnection:
        try:
            return await self._attempt(self._pooled(replica) or await self._connect(replica), head, payload)
        except ConnectionBroke:
            try:
                return await self._attempt(await self._connect(replica), head, payload)
            except ConnectionBroke as error:
                raise broken(replica, error) from error

    async def _attempt(self, connection: EngineConnection, head: bytes, payload: Sequence[bytes]) -> EngineConnection:
        self._busy.add(connection)
        try:
            await connection.send(head, payload)
        except BaseException:
            self._busy.discard(connection)
            connection.close()
            raise
        return connection

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
        return await self._control(replica, path, _head("GET", path, (), None))

    async def post_control(self, replica: Replica, path: str, query: Mapping[str, str]) -> bytes:
        """The body of the 200 answer to a POST without a body. Raises UpstreamLost, also for any other status."""
        return await self._control(replica, path, _head("POST", f"{path}?{urlencode(query)}", (), 0))

    async def post_json(self, replica: Replica, path: str, payload: bytes, seconds_max: float) -> tuple[int, bytes]:
        """The status and body of the answer to a JSON POST. Raises UpstreamLost, also when it takes longer."""
        head = _head("POST", path, ((b"content-type", b"application/json"),), len(payload))
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
                connection = await self._exchange(replica, head, [payload])
                try:
                    return connection.status, await _whole(connection)
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


def _head(method: str, path: str, headers: Headers, length: int | None) -> bytes:
    lines = [b"%b: %b\r\n" % header for header in headers]
    if length is not None:
        lines.append(b"content-length: %d\r\n" % length)
    return b"%b %b HTTP/1.1\r\nhost: localhost\r\n%b\r\n" % (method.encode(), path.encode(), b"".join(lines))


def broken(replica: Replica, error: ConnectionBroke) -> UpstreamLost:
    """What a connection that breaks is to the callers."""
    return UpstreamLost(f"{replica.name}: {error}", connected=True)
