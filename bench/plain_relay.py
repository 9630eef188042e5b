"""The simplest possible proxy in Python: raw ASGI towards the client, aiohttp towards the backends in turn."""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import aiohttp

_Message = MutableMapping[str, Any]
_turns = itertools.count()
_backends = [url for url in os.environ.get("BENCH_BACKENDS", "").split(",") if url]
_sessions: list[aiohttp.ClientSession] = []


def _session() -> aiohttp.ClientSession:
    if not _sessions:
        connector = aiohttp.TCPConnector(limit=0)
        _sessions.append(aiohttp.ClientSession(connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()))
    return _sessions[0]


async def app(scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]) -> None:
    """ASGI entry."""
    if scope["type"] != "http":
        raise RuntimeError(f"no {scope['type']} here")
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    url = _backends[next(_turns) % len(_backends)] + scope["path"]
    headers = {"content-type": "application/json"}
    async with _session().request(scope["method"], url, data=bytes(body) or None, headers=headers) as answer:
        kept = [(name, value) for name, value in answer.raw_headers if name.lower() in (b"content-type", b"content-length")]
        await send({"type": "http.response.start", "status": answer.status, "headers": kept})
        while chunk := await answer.content.readany():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
