"""Heads that were parsed before: what comes of a request is the same as if its head had been parsed anew."""

from __future__ import annotations

import asyncio
import gc
import random
import re
from pathlib import Path
from typing import Any

import pytest
from uvicorn.server import ServerState

from gateway.http_server import protocol as door_protocol
from gateway.http_server.known_head import HEAD_BYTES_MAX, KnownHead
from gateway.http_server.request_cycle import Receive, RequestCycle, Scope, Send
from gateway.http_server.server import build_server
from gateway.settings import Settings

HEAD = b"POST /v1/x?a=1 HTTP/1.1\r\nhost: x\r\nContent-Length: %d\r\nx-a: b\r\n\r\n"
SCOPE: Scope = {"path": "/v1/x", "headers": [(b"host", b"x"), (b"content-length", b"5"), (b"x-a", b"b")]}
KNOWN = KnownHead.of(HEAD % 5 + b"hello", SCOPE)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with all that it sees of the request."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    seen = [scope[name] for name in ("method", "path", "raw_path", "query_string", "http_version", "headers")]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": repr((seen, body)).encode()})


class Line:
    """A client's end that keeps what it gets."""

    def __init__(self) -> None:
        self.got = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.got += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1)

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


async def answers_to(pieces: list[bytes], directory: Path) -> tuple[bytes, bool]:
    """What a connection that sends these pieces gets, and whether it was closed."""
    config = build_server(echo, Settings(run_dir=directory)).config
    config.load()
    state, line = ServerState(), Line()
    door: Any = config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg, operator]
    door.connection_made(line)
    for piece in pieces:
        if not line.closed:
            door.data_received(piece)
        for _ in range(3):
            await asyncio.sleep(0)
    while state.tasks and not door._in_message:
        await asyncio.gather(*state.tasks)
    got = (re.sub(rb"x-request-id: .{32}", b"", line.got), line.closed)
    door.connection_lost(None)
    while state.tasks:
        await asyncio.gather(*state.tasks)
    return got


def requests_of(source: random.Random) -> bytes:
    """Requests that are much alike, and sometimes are not, or are none."""
    heads = [HEAD, HEAD, HEAD, HEAD.replace(b"x-a: b", b"x-a: c"), HEAD.replace(b"POST", b"PUT"), b"\r\n" + HEAD]
    odd = [
        b"POST /v1/y HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        HEAD.replace(b"Content-Length: %d", b"Content-Length: 2x") + b"hi",
        HEAD.replace(b"Content-Length: %d", b"Content-Length: 2\r\nContent-Length: 3") + b"hi",
        HEAD.replace(b"Content-Length: %d", b"Content-Length:  02") + b"hi",
        HEAD.replace(b"Content-Length: %d", b"Content-Length: 2 ") + b"hi",
        HEAD.replace(b"Content-Length: %d", b"Content-Length: 2\r\nExpect: 100-continue") + b"hi",
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") % 2 + b"hi",
        HEAD.replace(b"x-a: b", b"connection: close") % 2 + b"hi",
        HEAD.replace(b"x-a: b", b"connection: upgrade\r\nupgrade: h2c") % 2 + b"hi",
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    stream = b""
    for _ in range(source.randint(2, 8)):
        size = source.choice([0, 1, 5, 9, 10, 123])
        stream += source.choice(odd) if source.random() < 0.1 else source.choice(heads) % size + source.randbytes(size)
    return stream


async def test_whatever_is_sent_is_understood_as_if_each_head_was_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = random.Random(5)
    for _ in range(400):
        stream = requests_of(source)
        lines = [found.end() for found in re.finditer(rb"\r\n", stream[:-1])]
        places = source.choice([range(1, len(stream)), lines])  # anywhere, or where lines of heads end
        cuts = sorted(source.sample(places, min(source.choice([0, 1, 3, 9]), len(places))))
        pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        with monkeypatch.context() as parsed:
            parsed.setattr(door_protocol, "HEADS_REMEMBERED_MAX", 0)
            wanted = await answers_to(pieces, tmp_path)
        assert await answers_to(pieces, tmp_path) == wanted, pieces


ONE, TWO = (b"POST /%b HTTP/1.1\r\nauthorization: %b\r\n" % names for names in ((b"one", b"alice"), (b"two", b"bob")))
TAIL = b"x-t: 1\r\nContent-Length: 5\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD % 5 + b"hello" + ONE, TAIL + b"hello" + TWO, TAIL + b"world"],
        [HEAD % 5 + b"hello" + b"POST /other HTTP/1.1\r\nX-Foo: ", HEAD % 5 + b"world"],
        [HEAD % 5 + b"hello" + b"P", HEAD % 5 + b"world"],
    ],
)
async def test_the_rest_of_a_head_is_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: list[bytes]) -> None:
    got = await answers_to(pieces, tmp_path)
    monkeypatch.setattr(door_protocol, "HEADS_REMEMBERED_MAX", 0)
    assert got == await answers_to(pieces, tmp_path)
    assert got[0].count(b"HTTP/1.1 ") >= 2


async def test_a_head_behind_another_request_has_the_same_bound(tmp_path: Path) -> None:
    piece = HEAD % 5 + b"hello" + b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n"
    got, closed = await answers_to([piece, b"z: 1\r\n\r\n"], tmp_path)
    assert [line.split()[1] for line in re.findall(rb"HTTP/1.1 \d+", got)] == [b"200", b"431"]
    assert closed


async def test_a_connection_that_is_gone_leaves_nothing_for_the_collector(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            await answers_to([HEAD % 5 + b"hello" + HEAD % 500 + b"a part"], tmp_path)
        left = [each for each in gc.get_objects() if isinstance(each, (RequestCycle, door_protocol.DoorProtocol))]
    finally:
        gc.enable()
    assert left == []


async def test_a_head_that_comes_again_is_not_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = door_protocol.DoorProtocol._parse
    monkeypatch.setattr(door_protocol.DoorProtocol, "_parse", lambda self, data: (parsed.append(data), parse(self, data)))
    got, _ = await answers_to([HEAD % 5 + b"hello", HEAD % 12 + b"hel", b"lo", b" twice", b"!" + HEAD % 0], tmp_path)
    assert parsed == [HEAD % 5 + b"hello"]
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert b"b'hello twice!'" in got


async def test_what_comes_before_the_last_answer_waits_for_it(tmp_path: Path) -> None:
    first, turn = asyncio.Event(), iter(range(9))

    async def slow_once(scope: Scope, receive: Receive, send: Send) -> None:
        if next(turn) == 1:
            await first.wait()
        await echo(scope, receive, send)

    config = build_server(slow_once, Settings(run_dir=tmp_path)).config
    config.load()
    state, line = ServerState(), Line()
    door: Any = config.http_protocol_class(config=config, server_state=state, app_state={})  # type: ignore[call-arg, operator]
    door.connection_made(line)
    for body in (b"zero!", b"one!!", b"two!!"):
        door.data_received(HEAD % 5 + body)
        for _ in range(5):
            await asyncio.sleep(0)
    assert re.findall(rb"b'(\w+)!+'", line.got) == [b"zero"]
    first.set()
    while state.tasks:
        await asyncio.gather(*state.tasks)
    assert re.findall(rb"b'(\w+)!+'", line.got) == [b"zero", b"one", b"two"]
    door.connection_lost(None)


async def test_heads_that_all_differ_are_remembered_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[bytes] = []
    of = KnownHead.of
    monkeypatch.setattr(KnownHead, "of", lambda data, scope: (remembered.append(data), of(data, scope))[1])
    heads = [HEAD.replace(b"x-a: b", b"x-a: %d" % number) % 0 for number in range(9)]
    await answers_to(heads, tmp_path)
    assert remembered == heads[: door_protocol.HEADS_REMEMBERED_MAX]


@pytest.mark.parametrize("size", [0, 5, 123_456])
def test_the_bodys_length_is_the_new_one(size: int) -> None:
    assert KNOWN is not None
    data = HEAD % size + b"rest"
    start = KNOWN.body_starts(data)
    assert start == len(HEAD % size)
    scope, missing = KNOWN.scope(data, start)
    assert missing == size
    assert scope == SCOPE | {"headers": [(b"host", b"x"), (b"content-length", b"%d" % size), (b"x-a", b"b")]}


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"%d", b""),
        HEAD.replace(b"%d", b"+5"),
        HEAD.replace(b"%d", b"5 "),
        HEAD.replace(b"%d", b"5\r\nx-b: c"),
        HEAD.replace(b"%d", b"5" * 16),
        HEAD.replace(b"x-a", b"x-A") % 5,
        (HEAD % 5)[:-1],
    ],
)
def test_any_other_head_is_not_known(data: bytes) -> None:
    assert KNOWN is not None
    assert KNOWN.body_starts(data) is None


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", [(b"host", b"x")]),
        (HEAD.replace(b"%d", b"5 "), SCOPE["headers"]),
        (HEAD.replace(b"x-a: b", b"x-a: " + b"b" * HEAD_BYTES_MAX) % 5, SCOPE["headers"]),
        (HEAD % 5, [*SCOPE["headers"], (b"content-length", b"5")]),
        (HEAD % 5, [*SCOPE["headers"], (b"transfer-encoding", b"chunked")]),
        (HEAD % 6, SCOPE["headers"]),
        ((HEAD % 5)[:-1], SCOPE["headers"]),
    ],
)
def test_what_may_mean_something_else_next_time_is_not_remembered(data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    assert KnownHead.of(data, {"path": "/", "headers": headers}) is None
