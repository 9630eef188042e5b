"""One request on a client's connection and the answer to it: the server's side of it, and the application's.

An ASGI application uses `receive` and `send`. The front door's own code finds the cycle in the scope and uses it directly: a
chunk of a stream is then written without a task or a coroutine in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any, Protocol

from gateway.http_server.head_fields import HeadFields

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

EXTENSION = "peerkv.cycle"
"""The cycle's name among the scope's extensions."""

_logger = logging.getLogger(__name__)
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
BODILESS = frozenset({204, 304})
_USUAL_LINES = {status: line for status, line in _STATUS_LINES.items() if status >= 200 and status not in BODILESS}


class Line(Protocol):
    """The connection that a cycle writes to."""

    @property
    def write_paused(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    def close(self) -> None: ...
    def resume_reading(self) -> None: ...
    def answered(self) -> None: ...
    def date_head(self) -> bytes: ...
    def note(self, cycle: RequestCycle, status: int) -> None: ...
    async def drained(self) -> None: ...


class RequestCycle:
    """One request. `on_left` is called once when the client leaves before the answer is complete.

    `fields` is what is wanted of its headers, where that is known already.
    """

    __slots__ = (
        "_chunked",
        "_expects_continue",
        "_given_out",
        "_has_body",
        "_head",
        "_line",
        "_missing",
        "_parts",
        "_waiter",
        "begun",
        "complete",
        "extra_lines",
        "fields",
        "keep_alive",
        "left",
        "more_body",
        "on_left",
        "scope",
        "task",
        "unread_bytes",
    )

    def __init__(
        self, line: Line, scope: Scope, fields: HeadFields | None = None, *, keep_alive: bool, expects_continue: bool
    ) -> None:
        self.scope = scope
        self.fields = fields
        self.extra_lines = b""  # headers of the answer, whoever gives it
        self.task: asyncio.Task[None] | None = None  # in which the application runs
        self.keep_alive = keep_alive
        self.more_body = True
        self.unread_bytes = 0
        self.begun = False
        self.complete = False
        self.left = False
        self.on_left: Callable[[], None] | None = None
        self._line = line
        self._expects_continue = expects_continue
        self._parts: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None
        self._given_out = False
        self._head = b""
        self._chunked = False
        self._has_body = True
        self._missing = 0

    # Called by the connection.

    def feed(self, part: bytes) -> None:
        """A part of the request's body has arrived."""
        self._parts.append(part)
        self.unread_bytes += len(part)
        self._wake()

    def has_all(self, body: bytes) -> None:
        """All of the body came with the head, so nobody is waiting for it yet."""
        self._parts.append(body)
        self.unread_bytes = len(body)
        self.more_body = False

    def body_is_whole(self) -> None:
        """The last part has arrived."""
        self.more_body = False
        self._wake()

    def client_left(self) -> None:
        """The connection is gone."""
        if self.complete or self.left:
            return
        self.left = True
        self._parts.clear()
        self.unread_bytes = 0
        self._wake()
        if self.on_left is not None:
            self.on_left()

    async def run(self, app: Asgi, running: set[asyncio.Task[None]]) -> None:
        """Have the application answer. What it raises is a defect: it is logged, and a client that got nothing gets a 500.

        In the end the task is taken out of `running`, and the scope lets go of the cycle: else each request would leave
        objects that refer to each other, and a body with them, for the collector to find.
        """
        scope = self.scope
        scope["extensions"] = {EXTENSION: self}
        try:
            await app(scope, self.receive, self.send)
        except Exception as error:  # whatever it is, the connection must not stay open without an answer
            _logger.error("a defect in the application", exc_info=error)
        finally:
            if not self.complete and not self.left:
                self._end_badly()
            scope["extensions"].pop(EXTENSION, None)
            if self.task is not None:
                running.discard(self.task)
                self.task = None

    def _end_badly(self) -> None:
        if self.begun:
            self._line.close()
            return
        self.keep_alive = False
        self.start(500, [(b"content-type", b"text/plain"), (b"content-length", b"21")])
        self.end(b"Internal Server Error")

    # Called by the application.

    async def receive(self) -> Message:
        """ASGI's receive: the body, then the client's leaving."""
        part = None if self._given_out else await self.part()
        if self._given_out and part is None:
            while not self.left and not self.complete:
                await self._news()
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": not self._given_out}

    async def part(self) -> bytes | None:
        """What arrived of the body since the last call, b"" only at its end; None when nobody waits for an answer any more."""
        if self._expects_continue and not self.left:
            self._expects_continue = False
            self._line.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self._parts and self.more_body and not self.left and not self.complete:
            await self._news()
        return self.take()

    def take(self) -> bytes | None:
        """What has arrived of the body, as `part` returns it."""
        if self.left or self.complete:
            return None
        parts = self._parts
        part = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self.unread_bytes = 0
        self._given_out = not self.more_body
        self._line.resume_reading()
        return part

    async def send(self, message: Message) -> None:
        """ASGI's send."""
        if self._line.write_paused and not self.left:
            await self._line.drained()
        if message["type"] == "http.response.start":
            self.start(message["status"], list(message.get("headers", ())))
        elif message.get("more_body", False):
            self.write(message.get("body", b""))
        else:
            self.end(message.get("body", b""))

    def start(self, status: int, headers: RawHeaders) -> None:
        """Begin the answer. Without a content-length it is sent in chunks. Nothing leaves before the first `write` or `end`."""
        length: int | None = None
        lines = []
        for header in headers:
            if header[0] == b"connection":
                self.keep_alive = self.keep_alive and header[1].lower() != b"close"
                continue
            if header[0] == b"content-length":
                length = int(header[1])
            lines.append(b"%b: %b\r\n" % header)
        self.begin(status, b"".join(lines), length)

    def begin(self, status: int, lines: bytes, length: int | None = None) -> None:
        """As `start`, with headers as they are sent, none of them a connection's; their content-length is `length`."""
        if self.begun:
            raise RuntimeError("the answer has begun already")
        self.begun = True
        if self._expects_continue:
            # The client may send its body or not, so what comes next could be either that or a request.
            self._expects_continue = False
            self.keep_alive = self.keep_alive and not self.more_body
        self._has_body = self.scope["method"] != "HEAD" and status not in BODILESS
        last = b"\r\n"
        if length is not None:
            self._missing = length
        elif self._has_body and self.scope["http_version"] == "1.0":
            self.keep_alive = False
            self._missing = -1
        elif self._has_body:
            self._chunked = True
            last = b"transfer-encoding: chunked\r\n\r\n"
        if not self.keep_alive:
            last = last[:-2] + b"connection: close\r\n\r\n"
        first = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        self._line.note(self, status)
        self._head = b"%b%b%b%b%b" % (first, self._line.date_head(), self.extra_lines, lines, last)

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole answer; `lines` as for `begin`, its length among them."""
        line, first = self._line, _USUAL_LINES.get(status)
        unusual = self.begun or self.left or self._expects_continue or not self.keep_alive
        if first is None or unusual or self.scope["method"] == "HEAD":
            self.begin(status, lines, len(body))
            self.end(body)
            return
        self.begun = self.complete = True
        line.note(self, status)
        line.write(b"%b%b%b%b\r\n%b" % (first, line.date_head(), self.extra_lines, lines, body))
        self._wake()
        line.answered()

    def write(self, data: bytes) -> bool:
        """Send a part of the body; False when the client does not keep up: wait for `drained` before the next one."""
        if not self.begun or self.complete:
            raise RuntimeError("a part outside of an answer")
        if not self.left:
            framed = self._framed(data) if data else b""
            if self._head:
                framed, self._head = self._head + framed, b""
            if framed:
                self._line.write(framed)
        return not self._line.write_paused

    def end(self, data: bytes = b"") -> None:
        """Send the last part of the body."""
        if not self.begun or self.complete:
            raise RuntimeError("an end outside of an answer")
        if self.left:
            self.complete = True
            return
        framed = self._framed(data) if data else b""
        if self._missing > 0 and self._has_body:
            raise RuntimeError("the answer is shorter than its content-length")
        if self._chunked:
            framed += b"0\r\n\r\n"
        if self._head:
            framed, self._head = self._head + framed, b""
        self.complete = True
        if framed:
            self._line.write(framed)
        self._wake()
        if not self.keep_alive:
            self._line.close()
        self._line.answered()

    async def drained(self) -> None:
        """Wait until the client has read enough to take more, or is gone."""
        await self._line.drained()

    def _framed(self, data: bytes) -> bytes:
        if not self._has_body:
            return b""
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if self._missing >= 0:
            if len(data) > self._missing:
                raise RuntimeError("the answer is longer than its content-length")
            self._missing -= len(data)
        return data

    def _news(self) -> asyncio.Future[None]:
        self._waiter = waiter = asyncio.get_running_loop().create_future()
        return waiter

    def _wake(self) -> None:
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None


def cycle_of(scope: Scope) -> RequestCycle:
    """The cycle behind a scope of our own server. Raises KeyError for any other's."""
    cycle: RequestCycle = scope["extensions"][EXTENSION]
    return cycle
