"""HTTP/1.1 to a replica over its unix socket: one connection, one request at a time, kept open for the next one.

aiohttp's client took several times the CPU time of this one for the same request (`python -m bench.routers`). This one does no
more than the relay needs: a request whose body is at hand, an answer that is passed on as it comes, and an end when something
breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum, auto
from typing import cast

import httptools

from gateway.http_server.head_rules import VERSIONS, is_plainly_chunked
from gateway.upstream.answer_head import AnswerHead, KnownAnswer

HEAD_BYTES_MAX = 64 << 10
READ_AHEAD_BYTES_MAX = 256 << 10
"""Bytes of an answer that are held until they are asked for; beyond that the replica has to wait."""
_JOINED_BYTES_MAX = 64 << 10

_NO_HEAD = AnswerHead(0, [])

Sink = Callable[[bytes], bool]
Payload = Sequence[bytes | bytearray | memoryview]
"""A request's body, in parts."""


class ConnectionBroke(Exception):
    """The replica closed the connection before its answer was complete, or sent something that is not HTTP."""


class _State(Enum):
    IDLE = auto()
    HEAD = auto()  # a request was sent, and nothing came back yet
    BODY = auto()
    WHOLE = auto()  # all of the answer came
    BROKEN = auto()


_IDLE, _HEAD, _BODY, _WHOLE, _BROKEN = _State  # found faster than as attributes of the class


class EngineConnection(asyncio.Protocol):
    """One connection. `head` is of the last answer.

    Call `send`, then `read` to the end or `pump`, then hand it back to its pool if `reusable`, or `close` it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_lost: Callable[[EngineConnection], None]) -> None:
        self.head = _NO_HEAD
        self.idle_since = 0.0
        self.given_up = False
        self._loop = loop
        self._on_lost = on_lost
        self._state = _IDLE
        self._why = "it is closed"
        self._keep_alive = False
        self._framed = False
        self._head_bytes = 0
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._paused = False
        self._sink: Sink | None = None
        self._sink_is_full = False
        self._defect: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._is_between = True  # the parser is at the end of an answer, or has got nothing at all
        self._known: KnownAnswer | None = None
        self._headers: list[tuple[bytes, bytes]] = []

    # Called by the relay.

    async def send(self, head: bytes, body: Payload, size: int) -> None:
        """Send a request, its body of `size` bytes in parts, and wait for the head of its answer. Raises ConnectionBroke."""
        if self._state is not _IDLE:
            raise ConnectionBroke(self._why)
        self._state = _HEAD
        if size <= _JOINED_BYTES_MAX:
            self._transport.write(b"".join((head, *body)))
        else:
            self._transport.writelines((head, *body))
        while self._state is _HEAD:
            await self._news()
        if self._state is _BROKEN:
            raise ConnectionBroke(self._why)

    async def read(self) -> bytes:
        """The next bytes of the answer's body, b"" at its end. Raises ConnectionBroke."""
        while not self._pieces:
            if self._state is _WHOLE:
                return b""
            if self._state is not _BODY:
                raise ConnectionBroke(self._why)
            await self._news()
        return self._take()

    def at_hand(self) -> bytes | None:
        """All of the answer's body if the rest of it is there, as `read` would give it; else None."""
        if self._state is not _WHOLE:
            return None
        return self._take() if self._pieces else b""

    async def pump(self, sink: Sink, drained: Callable[[], Awaitable[None]]) -> None:
        """Give all of the body to `sink` as it comes, without a task in between.

        When it returns False it gets no more before `drained` is done. Raises ConnectionBroke, and what `sink` raises.
        """
        self._sink = sink
        try:
            self._feed_sink()
            while True:
                if self._defect is not None:
                    raise self._defect
                if self._sink_is_full:
                    await drained()
                    self._sink_is_full = False
                    self._feed_sink()
                elif self._state is _BODY:
                    await self._news()
                elif self._state is _WHOLE:
                    return
                else:
                    raise ConnectionBroke(self._why)
        finally:
            self._sink = None

    @property
    def reusable(self) -> bool:
        """Whether the answer is complete, its body was read, and another request may follow."""
        if self._state is not _WHOLE or not self._keep_alive or self._pieces or self._defect is not None:
            return False
        return self._transport.get_write_buffer_size() == 0 and not self._transport.is_closing()

    def reset(self, now: float) -> None:
        """Get ready for another request; `now` is time.monotonic's."""
        self._state = _IDLE
        self._is_between = True
        self._sink_is_full = False
        self.idle_since = now

    def close(self) -> None:
        """Close at once, which is how vLLM learns that nobody waits. Idempotent."""
        self._break("it is closed")

    def give_up(self, why: str) -> None:
        """Break the connection from our side, with this error for whoever waits for the answer."""
        self.given_up = True
        self._break(why)

    # Called by the event loop and by the parser.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        known = self._known
        if known is not None and self._is_between and self._state is _HEAD and (body := known.body(data)) is not None:
            self.head = known.head
            self._state = _WHOLE  # and kept alive as the one before, else this one would not have been asked for
            if body:
                self._pieces.append(body)
                self._held_bytes = len(body)
            self._wake()
        elif self._state is not _BROKEN:
            self._parse(data)

    def _parse(self, data: bytes) -> None:
        begins, self._is_between = self._is_between, False
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"its answer is not HTTP: {error}")
            return
        if begins and self._state is _WHOLE:
            self._known = KnownAnswer.of(data, self._headers, self.head)
        if self._sink is not None:
            self._feed_sink()
        elif self._held_bytes > READ_AHEAD_BYTES_MAX and self._state is _BODY and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        if self._sink is None or self._state is not _BODY or self._sink_is_full or self._defect is not None:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._state is _BODY and not self._framed and exc is None:
            self._state = _WHOLE  # an answer without a length goes to the connection's end
            self._keep_alive = False
            self._wake()
        elif self._state is not _WHOLE:
            self._break(f"the connection broke{f': {exc}' if exc else ''}")
        self._on_lost(self)

    def on_message_begin(self) -> None:
        if self._state is not _HEAD:
            raise ConnectionBroke("an answer that nobody asked for")
        self._headers = []
        self._head_bytes = 0
        self._framed = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise ConnectionBroke("the answer's head is too large")
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 100 or self._parser.get_http_version() not in VERSIONS:
            raise ConnectionBroke(f"an answer of HTTP/{self._parser.get_http_version()} with status {status}")
        if status < 200:
            return  # an interim answer
        names = dict(self._headers)
        coded = b"transfer-encoding" in names
        if coded and not is_plainly_chunked(self._headers):
            raise ConnectionBroke("an answer in another transfer coding than chunked")
        self._framed = coded or b"content-length" in names
        self.head = AnswerHead(status, self._headers)
        self._state = _BODY

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._held_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._state is _BODY:  # else an interim answer (1xx), and the real one follows
            self._keep_alive = self._parser.should_keep_alive()
            self._state = _WHOLE

    def _take(self) -> bytes:
        pieces = self._pieces
        taken = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._held_bytes = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return taken

    def _feed_sink(self) -> None:
        sink = self._sink
        if sink is None or not self._pieces or self._defect is not None:
            return
        if self._sink_is_full:
            if self._held_bytes > READ_AHEAD_BYTES_MAX and not self._paused:
                self._paused = True
                self._transport.pause_reading()
            return
        try:
            self._sink_is_full = not sink(self._take())
        except Exception as error:  # noqa: BLE001  it must reach the task that pumps, not the event loop
            self._defect = error

    def _news(self) -> asyncio.Future[None]:
        self._waiter = waiter = self._loop.create_future()
        return waiter

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None

    def _break(self, why: str) -> None:
        if self._state is not _BROKEN:
            self._state = _BROKEN
            self._why = why
            self._wake()
            self._transport.abort()
