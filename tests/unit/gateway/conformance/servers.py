"""What a server understands of the bytes on a connection, and what it writes: ours, and uvicorn's own two."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

import h11
import uvicorn
from uvicorn.server import ServerState

from gateway.http_server.server import build_server
from gateway.settings import Settings
from tests.unit.gateway.conformance.understood import End, Request, Requests, header_values

_TURNS_OF_AN_ANSWER = 2
"""Turns of the event loop in which the recorder answers a request whose last byte came."""
_STILL_TURNS = 4
"""Turns of the event loop without a word after which a server waits for the client."""


class Client:
    """A client's end of a connection."""

    def __init__(self) -> None:
        self.got = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.got += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_protocol(self, protocol: object) -> None:
        raise AssertionError("nobody may take the connection over")


class Recorder:
    """An application that keeps whole requests and answers each: those for /parts without a length."""

    def __init__(self, *, reads: bool = True) -> None:
        self.requests: list[Request] = []
        self.steps = 0
        self._reads = reads  # else it answers before the body came

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", self._reads
        while more:
            message = await receive()
            self.steps += 1
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = header_values(scope["headers"])
        method, version = scope["method"].encode(), scope["http_version"].encode()
        self.requests.append(Request(method, scope["raw_path"], scope["query_string"], version, headers, body))
        in_parts = scope["raw_path"].endswith(b"/parts")
        await send({"type": "http.response.start", "status": 200, "headers": [] if in_parts else [(b"content-length", b"6")]})
        await send({"type": "http.response.body", "body": b"ans", "more_body": True})
        await send({"type": "http.response.body", "body": b"wer"})


class Heard(NamedTuple):
    """What a server understood, and the bytes that it answered."""

    requests: Requests
    written: bytes


class Server:
    """One protocol class over a recorder; hears one connection at a time."""

    def __init__(self, config: uvicorn.Config, recorder: Recorder) -> None:
        config.load()
        self._config, self._recorder = config, recorder

    async def hear(self, pieces: list[bytes]) -> Heard:
        """Take these pieces one after the other, on a connection of their own."""
        recorder, state, client = self._recorder, ServerState(), Client()
        recorder.requests = []
        made: Any = self._config.http_protocol_class
        protocol = made(config=self._config, server_state=state, app_state={})
        protocol.connection_made(client)
        for piece in pieces:
            if client.paused:
                await self._settle(client)
            if client.closed:
                break
            try:
                protocol.data_received(piece)
            except h11.LocalProtocolError:  # uvicorn fails to tell a HEAD that is none: its event loop then closes
                client.close()
            for _ in range(_TURNS_OF_AN_ANSWER):
                await asyncio.sleep(0)
        await self._settle(client)
        requests, written, closed = tuple(recorder.requests), client.got, client.closed
        protocol.connection_lost(None)
        await asyncio.gather(*state.tasks)
        refused = getattr(protocol, "_rejected", False) or b"HTTP/1.1 400 Bad Request\r\n" in written
        end = End.REFUSED if refused else End.CLOSED if closed else End.OPEN
        return Heard(Requests(requests, end), written)

    async def _settle(self, client: Client) -> None:
        recorder, still, seen = self._recorder, 0, (-1, -1)
        while still < _STILL_TURNS:
            await asyncio.sleep(0)
            now = (recorder.steps, len(client.got))
            still, seen = (still + 1 if now == seen else 0), now


def our_server(settings: Settings, *, reads: bool = True) -> Server:
    """The gateway's, over an application that reads bodies or does not."""
    recorder = Recorder(reads=reads)
    return Server(build_server(recorder, settings).config, recorder)


def uvicorn_server(http: Any) -> Server:
    """uvicorn's own of that name, "h11" or "httptools"."""
    recorder = Recorder()
    options: Any = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False, "server_header": False}
    config = uvicorn.Config(recorder, http=http, proxy_headers=False, **options)
    return Server(config, recorder)
