"""The HTTP server: uvicorn with bounds on a request's head, and without signal handlers of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import ApiError, InvalidRequest, SettingsError, Unavailable
from gateway.exchange import sane_request_id
from gateway.settings import Settings

BACKLOG = 2048
# Beyond drain_seconds, for connections whose clients do not read their last bytes.
SHUTDOWN_GRACE_SECONDS = 5


class HeadTooLarge(InvalidRequest):
    """The request line and headers are larger than the settings allow."""

    code = "head_too_large"

    def __init__(self, bytes_max: int) -> None:
        super().__init__(f"The request's head is larger than the {bytes_max} bytes that are taken.", status=431)


class DoorProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds: on the number of connections, on a head's bytes and time, and on the time that a
    client may leave its answer unread. Errors have OpenAI's form.
    """

    connections_max: int
    head_bytes_max: int
    head_seconds_max: float
    stall_seconds_max: float

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_message = False
        self._rejected = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        if len(self.connections) > self.connections_max:
            self._reject(Unavailable(f"{self.connections_max} connections are open already."))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._goes_on_reading()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_seconds_max, self.transport.abort)

    def resume_writing(self) -> None:
        self._goes_on_reading()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        if self._rejected:
            return
        if not self._in_message:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_message or self._rejected or self._head_bytes == 0:
            return
        if self._head_bytes > self.head_bytes_max:
            self._reject(HeadTooLarge(self.head_bytes_max))
        elif self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._in_message = True
        self._head_came()
        # Bytes of a body may have come with the head, so only a suspicion leads to the exact count.
        if self._head_bytes > self.head_bytes_max and self._parsed_head_bytes() > self.head_bytes_max:
            self._reject(HeadTooLarge(self.head_bytes_max))
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._rejected:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._head_bytes = 0
        if not self._rejected:
            super().on_message_complete()
        self.headers = []  # else what is refused next would get this request's id

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP."""
        self._reject(InvalidRequest(msg, code="invalid_http"))

    def _parsed_head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds_max, self._head_is_late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _goes_on_reading(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self._in_message and not self.transport.is_closing():
            self.transport.close()

    def _reject(self, error: ApiError) -> None:
        """Answer and close. A request before this one that is still being answered loses its connection."""
        if self._rejected or self.transport.is_closing():
            return
        self._rejected = True
        if self.cycle is None or self.cycle.response_complete:
            body = error.body()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            headers["x-request-id"] = sane_request_id(dict(self.headers or ()).get(b"x-request-id"))
            lines = [f"HTTP/1.1 {error.status} Rejected"]
            lines += [f"{name}: {value}" for name, value in (headers | error.headers).items()]
            self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


class DoorServer(uvicorn.Server):
    """uvicorn's server; whoever runs it handles the signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def build_server(app: Any, settings: Settings) -> DoorServer:
    """A server for `app`; run it with `serve(sockets=[…])`."""
    protocol = type(
        "BoundDoorProtocol",
        (DoorProtocol,),
        {
            "connections_max": settings.connections_max,
            "head_bytes_max": settings.header_bytes_max,
            "head_seconds_max": settings.keep_alive_seconds,
            "stall_seconds_max": settings.client_stall_seconds_max,
        },
    )
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=settings.access_log,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=max(1, round(settings.keep_alive_seconds)),
        timeout_graceful_shutdown=round(settings.drain_seconds) + SHUTDOWN_GRACE_SECONDS,
    )
    return DoorServer(config)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on the address. Raises SettingsError when it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise SettingsError(f"cannot listen on host '{host}': {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}. Stop what uses it, or choose another --port."
        ) from None
    listener.setblocking(False)
    return listener
