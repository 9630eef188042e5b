"""A replica's answer on its way to the client, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.cycle import RawHeaders
from gateway.engine_connection import EngineConnection
from gateway.exchange import Exchange

_EVENT_STREAM = b"text/event-stream"
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


async def pass_on(exchange: Exchange, response: EngineConnection, *, bytes_max: int) -> Answer | None:
    """The answer if it is whole and nothing of it was sent yet; None when it was streamed to the client.

    An answer of more than `bytes_max` bytes is streamed. Raises ConnectionBroke when the replica breaks off.
    """
    status, headers = response.status, response.headers
    if dict(headers).get(b"content-type", b"").startswith(_EVENT_STREAM):
        events = _Events(exchange, status, _kept(headers), bytes_max)
        await response.pump(events.take, exchange.drained)
        events.end()
        return None
    if (body := response.at_hand()) is not None:
        return Answer(status, _kept(headers), body)
    return await _collect(exchange, response, bytes_max)


class _Events:
    """Passes an event stream on. Only whole events are sent, so that an error event can follow any of them."""

    def __init__(self, exchange: Exchange, status: int, headers: RawHeaders, bytes_max: int) -> None:
        self._exchange, self._status, self._headers, self._bytes_max = exchange, status, headers, bytes_max
        self._held = b""
        self._begun = False

    def take(self, chunk: bytes) -> bool:
        """Send what is whole; False when the client does not keep up."""
        if self._held:
            chunk, self._held = self._held + chunk, b""
        if not chunk.endswith(_EVENT_END) and len(chunk) <= self._bytes_max:
            whole = chunk.rfind(_EVENT_END) + len(_EVENT_END)
            if whole < len(_EVENT_END):
                self._held = chunk
                return True
            chunk, self._held = chunk[:whole], chunk[whole:]
        if not self._begun:
            self._begin()
        return self._exchange.write(chunk)

    def end(self) -> None:
        """The replica's answer is complete."""
        if not self._begun:
            self._begin()
        self._exchange.finish(self._held)

    def _begin(self) -> None:
        self._begun = True
        self._exchange.begin(self._status, self._headers, is_event_stream=True)


async def _collect(exchange: Exchange, response: EngineConnection, bytes_max: int) -> Answer | None:
    status, headers = response.status, _kept(response.headers)
    parts: list[bytes] = []
    size = 0
    while part := await response.read():
        parts.append(part)
        size += len(part)
        if size > bytes_max:
            break
    else:
        return Answer(status, headers, b"".join(parts))
    exchange.begin(status, headers)
    exchange.write(b"".join(parts))
    del parts
    while part := await response.read():
        if not exchange.write(part):
            await exchange.drained()
    exchange.finish()
    return None


def _kept(headers: RawHeaders) -> RawHeaders:
    return [header for header in headers if header[0] not in _DROPPED_HEADERS]
