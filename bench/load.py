"""The load generator: a number of connections, each sending one request after another, as cheaply as Python allows.

Every answer is checked: its status, and that it is complete.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import httptools
import msgspec

from bench.backend import DONE, EVENT, PROOF, WHOLE
from bench.cases import EVENTS, MODEL, PATHS, Case, Endpoint

STALL_SECONDS = 0.03
"""A request that takes longer on a single connection was held up by something: delayed ACKs take 40 ms."""
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"


class WrongAnswer(Exception):
    """A proxy's answer differs from the backend's."""


@dataclass(slots=True)
class Samples:
    """What a run measured: seconds of each request and in total."""

    seconds: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0


@dataclass(slots=True)
class Target:
    """Where requests go: host, port, and a key if one is needed."""

    port: int
    key: str = ""

    def head(self, path: str, size: int) -> bytes:
        """Return a request's head."""
        key = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        return (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{key}content-length: {size}\r\n\r\n"
        ).encode()


class _Client(asyncio.Protocol):
    """One connection. Sends the next request as soon as the last one is answered, until `stop_at`."""

    def __init__(self, target: Target, path: str, bodies: Iterator[bytes], stream: bool, samples: Samples) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stop_at = float("inf")
        self._target, self._path, self._bodies, self._stream = target, path, bodies, stream
        self._samples = samples
        self._parts: list[bytes] = []
        self._missing = -1
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(WrongAnswer(f"the connection broke: {exc!r}, after {b''.join(self._parts)[:300]!r}"))

    def _next(self) -> None:
        if time.perf_counter() >= self.stop_at:
            self.done.set_result(None)
            self._transport.close()
            return
        body = next(self._bodies)
        self._missing = -1
        self._began = time.perf_counter()
        self._transport.write(self._target.head(self._path, len(body)) + body)

    def data_received(self, data: bytes) -> None:
        parts = self._parts
        parts.append(data)
        if self._missing < 0:
            if len(parts) > 1:
                data = b"".join(parts)
                parts[:] = [data]
            end = data.find(_HEAD_END)
            if end < 0:
                return
            length = _content_length(data[:end])
            self._missing = (1 << 60) if length is None else length - (len(data) - end - 4)
        else:
            self._missing -= len(data)
        if self._missing == 0 or (self._missing > 1 << 40 and data.endswith(_LAST_CHUNK)):
            self._whole(b"".join(parts))

    def _whole(self, answer: bytes) -> None:
        self._samples.seconds.append(time.perf_counter() - self._began)
        self._parts.clear()
        if not is_right(answer, self._stream):
            self.done.set_exception(WrongAnswer(f"not what the backend sent: {answer[:400]!r}"))
            self._transport.close()
            return
        self._next()


def _content_length(head: bytes) -> int | None:
    lower = head.lower()
    at = lower.find(b"content-length:")
    return None if at < 0 else int(lower[at + 15 :].partition(b"\r\n")[0])


def is_right(answer: bytes, stream: bool) -> bool:
    """Tell whether an answer's bytes, including its head, are the backend's complete answer."""
    if not answer.startswith(b"HTTP/1.1 200"):
        return False
    if stream and answer.count(EVENT) == EVENTS and DONE in answer:
        return True
    return parsed_body(answer) == (EVENT * EVENTS + DONE if stream else WHOLE)


def parsed_body(answer: bytes) -> bytes:
    """Return the body of an HTTP answer, however it is framed."""
    parts: list[bytes] = []

    class Reader:
        def on_body(self, body: bytes) -> None:
            parts.append(body)

    httptools.HttpResponseParser(Reader()).feed_data(answer)
    return b"".join(parts)


async def run(target: Target, case: Case, endpoint: Endpoint, bodies: Iterator[bytes], warm: float, seconds: float) -> Samples:
    """Load `target` for `warm` seconds that do not count, then `seconds` that do. Raises WrongAnswer, OSError."""
    loop = asyncio.get_running_loop()
    samples = Samples()
    clients: list[_Client] = []
    for _ in range(case.connections):
        _, client = await loop.create_connection(
            lambda: _Client(target, PATHS[endpoint], bodies, case.stream, samples), "127.0.0.1", target.port
        )
        clients.append(client)
    waiting = asyncio.gather(*(client.done for client in clients))
    await asyncio.wait([waiting], timeout=warm)
    samples.seconds.clear()
    began = time.perf_counter()
    for client in clients:
        client.stop_at = began + seconds
    await waiting
    samples.wall_seconds = time.perf_counter() - began
    return samples


async def prove(target: Target, endpoint: Endpoint, text: str) -> None:
    """Check that the engine returns this prompt's digest. Raises WrongAnswer if it is another prompt's."""
    asked = {"prompt": text} if endpoint == "completions" else {"messages": [{"role": "user", "content": text}]}
    body = msgspec.json.encode({"model": MODEL, **asked, "max_tokens": 1, "user": PROOF})
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(target.head(PATHS[endpoint], len(body)).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n") + body)
        answer = await reader.read(-1)
    finally:
        writer.close()
    wanted = hashlib.sha256(text.encode()).hexdigest()
    if b"200" not in answer[:15] or msgspec.json.decode(parsed_body(answer)) != {"sha256": wanted}:
        raise WrongAnswer(f"the prompt did not arrive unchanged: {answer[:400]!r}")


async def status_without_key(port: int, endpoint: Endpoint) -> int:
    """Return the status of a request without a key."""
    body = msgspec.json.encode({"model": MODEL, "prompt": "x", "messages": [{"role": "user", "content": "x"}]})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(Target(port).head(PATHS[endpoint], len(body)) + body)
        return int((await reader.readline()).split()[1])
    finally:
        writer.close()
