"""HTTP to the replicas over their unix sockets: one pooled aiohttp session a replica.

aiohttp's errors end here: whatever a dead, dying or silent replica does becomes `UpstreamLost`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from engine.fleet import Replica
from gateway.errors import GatewayError, ReplicaTooSlow
from gateway.settings import Settings

_BASE = URL("http://localhost")
# Added by aiohttp if not named here; an Accept-Encoding would have answers compressed.
_UNWANTED_HEADERS = ("Accept-Encoding", "User-Agent")
_LOST = (aiohttp.ClientError, OSError, asyncio.TimeoutError)


class UpstreamLost(GatewayError):
    """The connection to a replica failed or broke; `connected` says whether there was one."""

    def __init__(self, message: str, *, connected: bool) -> None:
        super().__init__(message)
        self.connected = connected


class Upstream:
    """Connections to the replicas, by socket. Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._urls: dict[str, URL] = {}

    async def post(self, replica: Replica, path: str, payload: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """Send the request and return the response when its head is there; the caller closes it.

        A connection from the pool may have been closed by the replica a moment ago, which shows only when it is used.
        So a connection that breaks before the head is tried once more, on a new one if need be.
        Raises UpstreamLost, ReplicaTooSlow.
        """
        try:
            return await self._post(replica, path, payload, headers)
        except UpstreamLost as lost:
            if not lost.connected:
                raise
        return await self._post(replica, path, payload, headers)

    async def _post(self, replica: Replica, path: str, payload: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        seconds = self._settings.response_head_seconds_max
        try:
            async with asyncio.timeout(seconds) as bound:
                return await self._session(replica).post(self._url(path), data=payload, headers=headers)
        except _LOST as error:
            if bound.expired() and seconds is not None:
                raise ReplicaTooSlow(seconds) from None
            raise _lost(replica, error) from error

    async def get_bytes(self, replica: Replica, path: str) -> bytes:
        """The body of a control call's 200 answer. Raises UpstreamLost, also for any other status."""
        return await self._control("GET", replica, path, {})

    async def post_control(self, replica: Replica, path: str, query: Mapping[str, str]) -> bytes:
        """The body of the 200 answer to a POST without a body. Raises UpstreamLost, also for any other status."""
        return await self._control("POST", replica, path, query)

    async def post_json(self, replica: Replica, path: str, body: Mapping[str, Any]) -> bytes:
        """The body of the 200 answer to a JSON POST. Raises UpstreamLost, also for any other status."""
        headers = {"content-type": "application/json"}
        return await self._control("POST", replica, path, {}, msgspec.json.encode(body), headers)

    async def _control(
        self,
        method: str,
        replica: Replica,
        path: str,
        query: Mapping[str, str],
        payload: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        url = self._url(path).with_query(query) if query else self._url(path)
        try:
            async with (
                asyncio.timeout(self._settings.control_seconds),
                self._session(replica).request(method, url, data=payload, headers=headers) as response,
            ):
                content = await response.read()
        except _LOST as error:
            raise _lost(replica, error) from error
        if response.status != 200:
            raise UpstreamLost(f"{replica.name} answered {response.status} to {path}", connected=True)
        return content

    def _url(self, path: str) -> URL:
        return self._urls.get(path) or self._urls.setdefault(path, _BASE.with_path(path))

    def _session(self, replica: Replica) -> aiohttp.ClientSession:
        session = self._sessions.get(replica.socket)
        if session is None:
            settings = self._settings
            session = self._sessions[replica.socket] = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(replica.socket, limit=0, keepalive_timeout=settings.upstream_idle_seconds),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=settings.connect_seconds),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_UNWANTED_HEADERS,
                auto_decompress=False,
            )
        return session

    async def close(self) -> None:
        """Close all connections."""
        sessions = list(self._sessions.values())
        self._sessions.clear()
        for session in sessions:
            await session.close()


@contextmanager
def broken(replica: Replica) -> Iterator[None]:
    """Turn errors of reading a replica's answer into UpstreamLost."""
    try:
        yield
    except _LOST as error:
        raise _lost(replica, error) from error


def _lost(replica: Replica, error: BaseException) -> UpstreamLost:
    connected = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ServerTimeoutError)
    return UpstreamLost(f"{replica.name}: {type(error).__name__}: {error}", connected=connected)
