"""A replica's answer on its way to the client, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp

from gateway.exchange import Exchange, RawHeaders

_EVENT_STREAM = "text/event-stream"
_EVENT_END = b"\n\n"
# Of one connection only, or set anew by our own server.
_DROPPED_HEADERS = frozenset(
    {b"connection", b"content-length", b"date", b"keep-alive", b"server", b"transfer-encoding", b"x-request-id"}
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A replica's whole answer, not yet sent."""

    status: int
    headers: RawHeaders
    body: bytes


async def pass_on(exchange: Exchange, response: aiohttp.ClientResponse, *, bytes_max: int) -> Answer | None:
    """The answer if it is whole and nothing of it was sent yet; None when it was streamed to the client.

    An answer of more than `bytes_max` bytes is streamed. Raises aiohttp's errors when the replica breaks off.
    """
    if response.headers.get("content-type", "").startswith(_EVENT_STREAM):
        await _pass_events(exchange, response, bytes_max)
        return None
    return await _collect(exchange, response, bytes_max)


async def _pass_events(exchange: Exchange, response: aiohttp.ClientResponse, bytes_max: int) -> None:
    """Pass an event stream on. Only whole events are sent, so that an error event can follow any of them."""
    content, send = response.content, exchange.send
    held = b""
    while chunk := await content.readany():
        if held:
            chunk = held + chunk
            held = b""
        if not chunk.endswith(_EVENT_END) and len(chunk) <= bytes_max:
            whole = chunk.rfind(_EVENT_END) + len(_EVENT_END)
            if whole < len(_EVENT_END):
                held = chunk
                continue
            chunk, held = chunk[:whole], chunk[whole:]
        if not exchange.begun:
            await exchange.begin(response.status, _kept(response), is_event_stream=True)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    if not exchange.begun:
        await exchange.begin(response.status, _kept(response), is_event_stream=True)
    await exchange.finish(held)


async def _collect(exchange: Exchange, response: aiohttp.ClientResponse, bytes_max: int) -> Answer | None:
    parts: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        parts.append(chunk)
        size += len(chunk)
        if size > bytes_max:
            break
    else:
        return Answer(response.status, _kept(response), b"".join(parts))
    await exchange.begin(response.status, _kept(response))
    await exchange.send({"type": "http.response.body", "body": b"".join(parts), "more_body": True})
    del parts
    while chunk := await response.content.readany():
        await exchange.send({"type": "http.response.body", "body": chunk, "more_body": True})
    await exchange.finish()
    return None


def _kept(response: aiohttp.ClientResponse) -> RawHeaders:
    return [(name, value) for name, value in response.raw_headers if name.lower() not in _DROPPED_HEADERS]
