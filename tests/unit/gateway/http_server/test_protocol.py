"""What a client may send on a connection, byte by byte, and what comes back."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.gateway.running_door import Door, running_door, until

BODY = json.dumps({"model": "fake-model", "prompt": "hello", "max_tokens": 3}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
CLOSE = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        yield door


async def said(door: Door, *pieces: bytes) -> bytes:
    """All that the server says to these pieces until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


def post(body: bytes, more: bytes = b"") -> bytes:
    return POST + more + b"content-length: %d\r\n\r\n" % len(body) + body


async def test_requests_that_come_at_once_are_answered_one_after_the_other(door: Door) -> None:
    slow = json.dumps({"prompt": "x", "max_tokens": 2, "fake": {"delay": 0.1}}).encode()
    answer = await said(door, post(slow) + post(BODY) + CLOSE)
    heads = [part for part in answer.split(b"HTTP/1.1 ") if part]
    assert [head[:3] for head in heads] == [b"200"] * 3
    assert [b"w0 w1 w2" in head for head in heads] == [False, True, False]
    assert heads[2].endswith(b'{"status":"ok"}')


async def test_a_body_in_chunks_is_a_body(door: Door) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    answer = await said(door, POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n", chunks)
    assert b"w0 w1 w2" in answer


async def test_a_client_that_asks_may_send_its_body(door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(POST + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
    async with asyncio.timeout(10):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert b" 200 " in await reader.readline()
    writer.close()


async def test_a_client_of_http_1_0_gets_a_stream_without_chunks_and_the_end_of_the_connection(door: Door) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True}).encode()
    head, _, events = (await said(door, post(body).replace(b"HTTP/1.1", b"HTTP/1.0"))).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert events.startswith(b"data: ")
    assert events.endswith(b"data: [DONE]\n\n")


async def test_a_head_is_answered_without_a_body(door: Door) -> None:
    head, _, body = (await said(door, CLOSE.replace(b"GET", b"HEAD"))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


async def test_an_upgrade_is_not_had_and_the_request_is_answered(door: Door) -> None:
    answer = await said(door, CLOSE.replace(b"connection: close", b"connection: upgrade\r\nupgrade: h2c"))
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b'{"status":"ok"}')


async def test_what_follows_a_last_request_does_not_cost_its_answer(door: Door) -> None:
    answer = await said(door, post(BODY, b"connection: close\r\n"), b"\r\nmore")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b"w0 w1 w2" in answer


async def test_a_client_that_leaves_in_the_middle_of_its_body_leaves_nothing(door: Door) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(POST + b"content-length: 1000\r\n\r\n{")
    await until(lambda: door.relay.in_flight == 1)
    writer.close()
    await until(lambda: door.relay.in_flight == 0)
    assert door.relay.counters.clients_left == 1
    await until(lambda: not door.server.server_state.tasks)


async def test_a_large_body_that_comes_in_pieces_arrives_whole(door: Door) -> None:
    text = "word " * 400_000
    body = json.dumps({"prompt": text, "max_tokens": 1}).encode()
    head, rest = post(body, b"connection: close\r\n").split(b"\r\n\r\n", 1)
    pieces = [rest[start : start + 100_000] for start in range(0, len(rest), 100_000)]
    answer = await said(door, head + b"\r\n\r\n", *pieces)
    assert b"2000000 input tokens" in answer  # the fake engine counts characters, and says so when they are too many


async def test_the_next_request_may_come_late_but_not_too_late(tmp_path: Path) -> None:
    async with running_door(tmp_path, keep_alive_seconds=0.4) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.timeout(10):
            while loop.time() < began + 0.8:  # twice the bound, but never idle for so long
                writer.write(CLOSE.replace(b"connection: close\r\n", b""))
                assert b" 200 " in await reader.readline()
                await reader.readuntil(b'{"status":"ok"}')
            assert await reader.read() == b""
        assert loop.time() < began + 5
        writer.close()


async def test_answers_are_logged_where_that_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "uvicorn.access")
    async with running_door(tmp_path, access_log=True) as door:
        assert (await door.get("/health?x=1"))[0] == 200
    assert [record.getMessage().partition(" - ")[2] for record in caplog.records] == ['"GET /health?x=1 HTTP/1.1" 200']
