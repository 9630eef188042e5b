"""HTTP/1.1 from the clients: uvicorn's server with a protocol of our own, with a bound on everything that a client can do.

Errors have OpenAI's form. Beside uvicorn's own protocol this one takes half the CPU time for a request (`python -m
bench.routers`): it starts no timer and no task that the front door does not need, and an answer's head and body leave together.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.errors import ApiError, InvalidRequest, TooManyRequests, Unavailable
from gateway.http_server.head_fields import sane_request_id
from gateway.http_server.head_rules import OF_CONNECTION, head_defect
from gateway.http_server.known_head import KnownHead
from gateway.http_server.rejection import HeadTooLarge, rejection
from gateway.http_server.request_cycle import Asgi, RawHeaders, RequestCycle, Scope

BODY_READ_AHEAD_BYTES_MAX = 256 << 10
"""Bytes of a request's body that are held before the application asks for them."""
PIPELINED_READ_MAX = 8
"""Requests that may wait for the answers before theirs while more is read: without reading, a client's leaving goes unseen."""
PIPELINED_MAX = 1024
"""All requests that may wait, with those that arrived in the same piece as the last one."""
SILENT_SECONDS_MIN = 0.5
"""When there are too many connections, those without a first request for so long make room for new ones."""
HEADS_REMEMBERED_MAX = 4
"""After this many heads in a row that differ, a connection stops remembering heads."""

_TASK_NAME = "a request"

_access = logging.getLogger("uvicorn.access")
_ASGI = {"version": "3.0", "spec_version": "2.3"}


class DoorProtocol(asyncio.Protocol):
    """One client's connection. The bounds are set by `build_server`: on the number of connections, on a head's bytes and time,
    on the time between requests, and on the time that a client may leave its answer unread.
    """

    connections_max: int
    strangers: dict[DoorProtocol, float]
    """Connections without a complete head so far, the oldest first, with the loop's time when they were made."""
    head_bytes_max: int
    head_seconds_max: float
    stall_seconds_max: float
    access_log: bool
    write: Callable[[bytes], None]
    """Sends bytes: the transport's own, without a call in between."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self.loop = _loop or asyncio.get_running_loop()
        self.write_paused = False
        self._app = cast(Asgi, config.loaded_app)
        self._state = server_state
        self._parser = self._new_parser()
        self._cycle: RequestCycle | None = None
        self._waiting: deque[RequestCycle] = deque()
        self._upload: RequestCycle | None = None  # whose body is arriving
        self._reading_paused = False
        self._drained: asyncio.Event | None = None
        self._url = b""
        self._headers: RawHeaders = []
        self._expects_continue = False
        self._begins_behind = False
        self._in_message = False
        self._rejected = False
        self._is_stranger = True
        self._known: KnownHead | None = None
        self._remembered_in_vain = 0
        self._unparsed: bytes | None = None  # what begins with the head that is being parsed
        self._missing = 0  # bytes of a body whose head was known
        self._dated: RawHeaders | None = None
        self._date_head = b""
        self._head_bytes = 0  # since the last byte of a body: those of a head, of trailers, of chunks' extensions
        self._waits_since = 0.0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.write = self.transport.write
        # A client that is gone already has no name any more.
        self._server, self._client = (
            tuple((transport.get_extra_info(side) or ("", 0))[:2]) for side in ("sockname", "peername")
        )
        self._state.connections.add(self)  # type: ignore[arg-type]
        if len(self._state.connections) > self.connections_max:
            self._take_place()
        if not self._rejected:
            self.strangers[self] = self.loop.time()
            self._await_head()

    def _take_place(self) -> None:
        """Close the connection that has said nothing for longest, or reject this one if each had too little time to speak."""
        oldest = next(iter(self.strangers), None)
        if oldest is None or self.loop.time() < self.strangers[oldest] + SILENT_SECONDS_MIN:
            self._reject(Unavailable(f"{self.connections_max} connections are open already."))
        else:
            oldest.give_place()

    def give_place(self) -> None:
        """Close at once, to make room for another client. No request has come here so far."""
        self.strangers.pop(self, None)
        self._state.connections.discard(self)
        self._rejected = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.strangers.pop(self, None)
        self._state.connections.discard(self)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = None
        self._goes_on()
        self._client_left()
        # These refer to this connection: without them it is gone at once, and not when the collector finds it.
        self._cycle = self._upload = self._parser = None

    def data_received(self, data: bytes) -> None:
        while data and not self._rejected:
            if self._missing:
                data = self._take_body(data)
            elif self._known is not None and self._is_between and (start := self._known.body_starts(data)) is not None:
                data = self._open_known(self._known, data, start)
            else:
                self._parse(data)
                return

    def _open_known(self, known: KnownHead, data: bytes, start: int) -> bytes:
        """Begin a request with a head that was parsed before; returns its body and what follows."""
        self._remembered_in_vain = 0
        scope, missing = known.scope(data, start)
        cycle = RequestCycle(self, scope, known.fields, keep_alive=True, expects_continue=False)
        body = data[start:]
        if len(body) == missing <= BODY_READ_AHEAD_BYTES_MAX and self._is_free:
            cycle.has_all(body)
            self._begin(cycle)
            return b""
        self._missing = missing
        self._headers = scope["headers"]
        self._open(cycle)
        if not missing:
            self.on_message_complete()
        return body

    def _take_body(self, data: bytes) -> bytes:
        """Feed the body of a request whose head was known, past the parser, which would copy it; returns what follows it."""
        body = data[: self._missing]  # `data` itself if it is no longer
        self._missing -= len(body)
        self.on_body(body)
        if not self._missing:
            self.on_message_complete()
        return data[len(body) :]

    @property
    def _is_between(self) -> bool:
        """Whether the next bytes begin a request."""
        return not self._in_message and self._head_bytes == 0

    @property
    def _is_free(self) -> bool:
        """Whether nothing is being answered and all requests were read to their ends."""
        return (self._cycle is None or self._cycle.complete) and not self.write_paused

    def _parse(self, data: bytes) -> None:
        worth_it = self._remembered_in_vain < HEADS_REMEMBERED_MAX and self._is_between
        self._unparsed = data if worth_it else None
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on_without_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError:
            self._reject(InvalidRequest("Invalid HTTP request received.", code="invalid_http"))
            return
        if self._rejected or self._head_bytes == 0:
            return
        if self._head_bytes > self.head_bytes_max:
            self._reject(HeadTooLarge(self.head_bytes_max))
        elif not self._in_message and self._head_bytes == len(data):
            self._await_head()

    def eof_received(self) -> None:
        """The client sends no more. It counts as gone even if bytes for it are left; uvloop and asyncio then close."""
        self._client_left()
        self.close()

    def pause_writing(self) -> None:
        self.write_paused = True
        self._stall_timer = self.loop.call_later(self.stall_seconds_max, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        self._goes_on()
        if self.transport.is_closing():
            self.close()
        elif self._waiting and (self._cycle is None or self._cycle.complete):
            self._begin(self._waiting.popleft())
            self.resume_reading()

    # Called by the parser.

    def on_message_begin(self) -> None:
        # A head that begins behind another message, in the same piece: from here on we are within it.
        self._begins_behind = self._head_bytes == 0
        self._head_bytes = self._head_bytes or 1
        self._url = b""
        self._headers = []
        self._expects_continue = False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_message:  # a trailer is forgotten: whoever judged the head before us did not see it
            if name.lower() in OF_CONNECTION:  # but the parser would obey it, and pass over the next request
                self._reject(InvalidRequest("A trailer may not speak of the connection.", code="invalid_http"))
            return
        name, value = name.lower(), value.rstrip(b" \t")
        if name == b"expect" and value.lower() == b"100-continue":
            self._expects_continue = True
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._parser.should_upgrade():
            return  # the head comes once more, without
        self._in_message = True
        # Bytes of a body may have come with the head, or the head behind others': only a suspicion leads to the exact count.
        suspicious = self._begins_behind or self._head_bytes > self.head_bytes_max
        if suspicious and self._parsed_head_bytes() > self.head_bytes_max:
            self._reject(HeadTooLarge(self.head_bytes_max))
        if self._rejected:
            return
        version = self._parser.get_http_version()
        defect = head_defect(version, self._headers)
        if defect is not None:
            self._reject(defect)
            return
        keep_alive = version != "1.0" and self._parser.should_keep_alive()
        expects_continue = self._expects_continue and version != "1.0"
        scope = self._scope(version)
        if self._unparsed is not None and version == "1.1" and keep_alive and not expects_continue:
            self._known = KnownHead.of(self._unparsed, scope)
            self._remembered_in_vain += 1
        self._unparsed = None
        self._open(RequestCycle(self, scope, keep_alive=keep_alive, expects_continue=expects_continue))

    def _open(self, cycle: RequestCycle) -> None:
        """A request's head is complete."""
        if self._is_stranger:
            self._is_stranger = False
            self.strangers.pop(self, None)
        self._in_message = True
        self._head_bytes = 0
        self._upload = cycle
        if self._is_free:
            self._begin(cycle)
        elif len(self._waiting) < PIPELINED_MAX:  # answers go out in the order of the requests, and when those before were read
            self._waiting.append(cycle)
            if self.write_paused or len(self._waiting) > PIPELINED_READ_MAX:
                self._pause_reading()
        else:
            self._reject(TooManyRequests(PIPELINED_MAX))

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        cycle = self._upload
        if self._rejected or cycle is None or cycle.complete:
            return
        cycle.feed(body)
        unread = sum(waiting.unread_bytes for waiting in self._waiting) if self._waiting else cycle.unread_bytes
        if unread > BODY_READ_AHEAD_BYTES_MAX:
            self._pause_reading()

    def on_message_complete(self) -> None:
        if not self._in_message:
            return  # as in on_headers_complete
        self._in_message = False
        self._head_bytes = 0
        if not self._rejected and self._upload is not None:
            self._upload.body_is_whole()
        self._upload = None
        self._headers = []  # else what is refused next would get this request's id

    # Called by a cycle, and by uvicorn's server.

    def close(self) -> None:
        """Close when everything is sent, or the client has left it unread for too long."""
        self.transport.close()
        if self._stall_timer is None and self.transport.get_write_buffer_size():
            self._stall_timer = self.loop.call_later(self.stall_seconds_max, self.transport.abort)

    def resume_reading(self) -> None:
        """Take more of a request's body."""
        if self._reading_paused and not self._waiting and not self.transport.is_closing():
            self._reading_paused = False
            self.transport.resume_reading()

    def answered(self) -> None:
        """An answer is complete: begin the next one, or wait for a request."""
        self._state.total_requests += 1
        if self.transport.is_closing():
            return
        if not self._waiting:
            self._await_head()
        elif not self.write_paused:
            self._begin(self._waiting.popleft())
        if self._reading_paused:
            self.resume_reading()

    def date_head(self) -> bytes:
        """The lines that every answer's head has: uvicorn makes them anew each second."""
        headers = self._state.default_headers
        if headers is not self._dated:
            self._dated = headers
            self._date_head = b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._date_head

    def note(self, cycle: RequestCycle, status: int) -> None:
        """Log an answer if access_log is on."""
        if self.access_log:
            scope = cycle.scope
            target = scope["raw_path"].decode("latin-1")
            if query := scope["query_string"]:
                target += "?" + query.decode("latin-1")
            _access.info('%s:%s - "%s %s HTTP/%s" %d', *self._client, scope["method"], target, scope["http_version"], status)

    async def drained(self) -> None:
        """Wait until the client has read enough, or is gone."""
        while self.write_paused:
            if self._drained is None:
                self._drained = asyncio.Event()
            self._drained.clear()
            await self._drained.wait()

    def shutdown(self) -> None:
        """Finish what is being answered and close."""
        if self._cycle is None or self._cycle.complete:
            self.close()
        else:
            self._cycle.keep_alive = False

    def _new_parser(self) -> Any:
        parser = httptools.HttpRequestParser(self)
        parser.set_dangerous_leniencies(lenient_data_after_close=True)  # it is passed over; else it costs the answer before
        return parser

    def _go_on_without_upgrade(self, rest: bytes) -> None:
        """Upgrades are not supported: the request is answered as if it had not asked for one, and is the connection's last.

        The parser would take the request's body for the other protocol's, so another one gets the head without that wish.
        """
        method, version = self._parser.get_method(), self._parser.get_http_version().encode()
        if method == b"CONNECT":
            self._reject(InvalidRequest("There are no tunnels here.", code="invalid_http"))
            return
        lines = [b"%b %b HTTP/%b\r\n" % (method, self._url, version), b"connection: close\r\n"]
        lines += [b"%b: %b\r\n" % header for header in self._headers if header[0] not in (b"upgrade", b"connection")]
        self._head_bytes = 0
        self._parser = self._new_parser()
        self.data_received(b"".join((*lines, b"\r\n", rest)))

    def _scope(self, version: str) -> Scope:
        url = httptools.parse_url(self._url)
        raw_path = url.path or b"/"  # http://host has none
        path = raw_path.decode("ascii")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "server": self._server,
            "client": self._client,
            "scheme": "http",
            "root_path": "",
            "method": self._parser.get_method().decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "headers": self._headers,
        }

    def _begin(self, cycle: RequestCycle) -> None:
        self._cycle = cycle
        tasks = self._state.tasks
        # Made at once and with a name, it takes three quarters of the time of the loop's create_task.
        cycle.task = task = asyncio.Task(cycle.run(self._app, tasks), loop=self.loop, name=_TASK_NAME)
        tasks.add(task)

    def _client_left(self) -> None:
        for cycle in (self._cycle, *self._waiting):
            if cycle is not None:
                cycle.client_left()
        self._waiting.clear()

    def _pause_reading(self) -> None:
        if not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    def _goes_on(self) -> None:
        self.write_paused = False
        if self._drained is not None:
            self._drained.set()

    def _parsed_head_bytes(self) -> int:
        return len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers)

    def _await_head(self) -> None:
        """From now on a complete head must come in time. The timer is set once, and again if it goes off too early."""
        self._waits_since = self.loop.time()
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds_max, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing() or self._waiting or (self._cycle is not None and not self._cycle.complete):
            return
        left = self._waits_since + self.head_seconds_max - self.loop.time()
        if left > 0:
            self._head_timer = self.loop.call_later(left, self._head_is_late)
        else:
            self.close()

    def _reject(self, error: ApiError) -> None:
        """Answer and close. A request before this one that is still being answered loses its connection."""
        if self._rejected or self.transport.is_closing():
            return
        self._rejected = True
        cycle = self._cycle
        in_its_body = cycle is not None and cycle is self._upload and not cycle.begun
        is_next = not self._waiting and (cycle is None or cycle.complete or in_its_body)
        self._client_left()
        if is_next:
            given_id = dict(self._headers).get(b"x-request-id")
            self.transport.write(rejection(error, sane_request_id(given_id)))
        self.close()
