"""A relay with the two simplest policies, for machines where the Rust routers cannot be installed.

BENCH_BACKENDS: comma-separated URLs. BENCH_POLICY: round_robin, or sticky, which picks a backend by a hash of the prompt's
first PREFIX_CHARS characters.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import aiohttp
import msgspec
import xxhash

PREFIX_CHARS = 512

_Message = MutableMapping[str, Any]
_backends = [url for url in os.environ.get("BENCH_BACKENDS", "").split(",") if url]
_policy = os.environ.get("BENCH_POLICY", "round_robin")
_turns = itertools.count()
_sessions: list[aiohttp.ClientSession] = []


class Asked(msgspec.Struct):
    """The fields that the sticky policy reads from a body."""

    prompt: str = ""
    messages: list[dict[str, Any]] = []


def place(policy: str, body: bytes, turn: int, backends: int) -> int:
    """Return which of `backends` a request goes to."""
    if policy == "round_robin" or not body:
        return turn % backends
    asked = msgspec.json.decode(body, type=Asked)
    text = asked.prompt or "\n".join(str(message.get("content") or "") for message in asked.messages)
    return xxhash.xxh3_64_intdigest(text[:PREFIX_CHARS].encode()) % backends


def _session() -> aiohttp.ClientSession:
    if not _sessions:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        _sessions.append(aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False))
    return _sessions[0]


async def app(scope: _Message, receive: Callable[[], Awaitable[_Message]], send: Callable[[_Message], Awaitable[None]]) -> None:
    """ASGI entry."""
    if scope["type"] != "http":
        raise RuntimeError(f"no {scope['type']} here")
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    url = _backends[place(_policy, bytes(body), next(_turns), len(_backends))] + scope["path"]
    headers = {"content-type": "application/json"}
    async with _session().request(scope["method"], url, data=bytes(body) or None, headers=headers) as answer:
        kept = [(name, value) for name, value in answer.raw_headers if name.lower() in (b"content-type", b"content-length")]
        await send({"type": "http.response.start", "status": answer.status, "headers": kept})
        while chunk := await answer.content.readany():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
