"""What a client can cost the front door, and what it can slip in: every attempt here is bounded or refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway.http_server import protocol
from gateway.http_server.protocol import BODY_READ_AHEAD_BYTES_MAX, PIPELINED_MAX, DoorProtocol
from tests.unit.gateway.http_server.test_protocol import BODY, CLOSE, POST, post, said
from tests.unit.gateway.running_door import Door, running_door, until

CHUNKED = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
ONE_CHUNK = b"%x\r\n%b\r\n" % (len(BODY), BODY)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path, header_bytes_max=8192) as door:
        await door.add_engine("replica-0")
        yield door


async def connections_of(door: Door, count: int = 1) -> list[DoorProtocol]:
    await until(lambda: len(door.server.server_state.connections) == count)
    return list(door.server.server_state.connections)  # type: ignore[arg-type]


async def said_later(door: Door, begin: bytes, rest: bytes) -> bytes:
    """All that the server says to a request whose rest comes when its beginning was taken."""
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(begin)
    await until(lambda: door.relay.in_flight == 1)
    writer.write(rest)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    await until(lambda: door.relay.in_flight == 0)
    return answer


@pytest.mark.parametrize("name", ["Authorization", "Content-Type", "x-peerkv-replica", "x-peerkv-quality"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/health", "/kv/flush"])
async def test_a_header_of_which_there_is_one_is_not_sent_twice(door: Door, name: str, path: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n"
    answer = await said(door, f"{head}{name}: a\r\n{name.upper()}: a\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400")
    assert f"'{name.lower()}' occurs twice" in answer.decode()


async def test_a_client_that_reads_no_answers_gets_no_more_of_them(door: Door) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port, limit=16 << 10)
    request = b"GET /v1/" + b"x" * 4000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
    (connection,) = await connections_of(door)

    async def sends() -> None:
        for _ in range(5000):  # answers of more than 20 MB
            writer.write(request)
            await writer.drain()

    sending = asyncio.create_task(sends())
    await until(lambda: connection.write_paused)
    settled, seen, most = 0, -1, 0

    def stands_still() -> bool:
        nonlocal settled, seen, most
        size = connection.transport.get_write_buffer_size()
        answered = door.server.server_state.total_requests
        settled, seen, most = (settled + 1 if answered == seen else 0), answered, max(most, size)
        return settled > 20

    await until(stands_still)
    assert most < 1 << 20
    async with asyncio.timeout(30):
        for _ in range(5000):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 404")
            await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        await sending
    writer.close()


async def test_a_client_cannot_have_any_number_of_requests_wait(door: Door) -> None:
    slow = json.dumps({"prompt": "x", "max_tokens": 2, "fake": {"delay": 30}}).encode()
    began = asyncio.get_running_loop().time()
    assert await said(door, post(slow) + b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * (PIPELINED_MAX + 1)) == b""
    assert asyncio.get_running_loop().time() < began + 10
    await until(lambda: door.relay.in_flight == 0)


async def test_trailers_are_no_headers(tmp_path: Path) -> None:
    async with running_door(tmp_path, admin_key="admin-key-1", tenants=[{"name": "a", "api_key": "key-of-a-1"}]) as door:
        await door.add_engine("replica-0")
        answer = await said(door, CHUNKED + ONE_CHUNK + b"0\r\nauthorization: Bearer key-of-a-1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 401")


async def test_trailers_are_taken_and_forgotten(door: Door) -> None:
    answer = await said(door, CHUNKED + ONE_CHUNK + b"0\r\nx-request-id: theirs\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"theirs" not in answer


@pytest.mark.parametrize("trailers", [b"t: x\r\n" * 2000, b"x" * 9000], ids=["many", "one"])
async def test_endless_trailers_are_refused(door: Door, trailers: bytes) -> None:
    assert (await said_later(door, CHUNKED + ONE_CHUNK + b"0\r\n", trailers)).startswith(b"HTTP/1.1 431")


async def test_an_endless_chunk_extension_is_refused(door: Door) -> None:
    assert (await said_later(door, CHUNKED + b"1;", b"x" * 9000)).startswith(b"HTTP/1.1 431")


async def test_chunks_that_are_no_chunks_are_a_400(door: Door) -> None:
    assert (await said_later(door, CHUNKED, b"zz\r\n")).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_request_that_asks_for_an_upgrade_keeps_its_body(door: Door, pieces: int) -> None:
    # So does Java's client with the first request of every connection.
    request = post(BODY, b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n")
    answer = await said(door, *((request,) if pieces == 1 else (request[: -len(BODY)], BODY)))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"w0 w1 w2" in answer


async def test_a_chunked_request_that_asks_for_an_upgrade_keeps_its_body(door: Door) -> None:
    head = POST + b"connection: upgrade\r\nupgrade: h2c\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = await said(door, head, ONE_CHUNK[:5], ONE_CHUNK[5:] + b"0\r\n\r\n")
    assert b"w0 w1 w2" in answer


async def test_what_follows_an_upgrade_is_no_request(door: Door) -> None:
    upgrade = CLOSE.replace(b"connection: close", b"connection: upgrade\r\nupgrade: websocket")
    answer = await said(door, upgrade + CLOSE, CLOSE)
    assert answer.count(b"HTTP/1.1 ") == 1


async def test_a_tunnel_is_refused(door: Door) -> None:
    assert (await said(door, b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 400")


async def test_a_client_that_waits_for_a_word_and_gets_an_answer_starts_anew(door: Door) -> None:
    head = b"POST /v1/nothing HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n"
    answer = await said(door, head)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"connection: close" in answer


async def test_a_client_of_http_1_0_hears_no_interim_answer(door: Door) -> None:
    request = post(BODY, b"expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
    assert (await said(door, request)).startswith(b"HTTP/1.1 200")


async def test_a_length_of_very_many_digits_is_a_length(door: Door) -> None:
    request = POST + b"connection: close\r\ncontent-length: " + b"0" * 5000 + b"%d\r\n\r\n" % len(BODY) + BODY
    assert (await said(door, request)).startswith(b"HTTP/1.1 200")


async def test_a_client_that_ends_its_side_and_does_not_read_is_known_to_have_left(door: Door) -> None:
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 10**6, "n": 50}).encode()
    client = socket.create_connection(("127.0.0.1", door.port))
    client.sendall(post(body))
    (connection,) = await connections_of(door)
    await until(lambda: connection.write_paused)
    client.shutdown(socket.SHUT_WR)

    async def ended() -> bool:
        return bool((await door.seen("replica-0"))["running"] == 0)

    await until(ended, 1.0)
    client.close()


async def test_a_client_that_leaves_its_last_answer_unread_is_cut_off(tmp_path: Path) -> None:
    async with running_door(tmp_path, client_stall_seconds_max=0.3) as door:
        client = socket.create_connection(("127.0.0.1", door.port))
        (connection,) = await connections_of(door)
        connection.transport.set_write_buffer_limits(high=1 << 30)  # so that only the end is left to stall
        client.sendall((b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100) + CLOSE)
        await connections_of(door, 0)
        client.close()


@pytest.mark.parametrize("fake", [{"delay": 30}, {"token_delay": 0.02}], ids=["before the head", "while generating"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_request_ends_with_its_client_also_when_more_requests_wait(
    door: Door, fake: dict[str, float], stream: bool
) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(post(json.dumps({"prompt": "x", "max_tokens": 10_000, "stream": stream, "fake": fake}).encode()) + CLOSE)
    await until(lambda: door.relay.in_flight == 1)
    writer.close()
    await until(lambda: door.relay.in_flight == 0, 1.0)


async def test_bodies_of_requests_that_wait_are_read_ahead_only_so_far(door: Door) -> None:
    slow = json.dumps({"prompt": "x", "max_tokens": 1, "fake": {"delay": 0.3}}).encode()
    large = json.dumps({"prompt": "x" * 1_000_000}).encode()
    pieces = [post(large) for _ in range(4)]
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    (connection,) = await connections_of(door)
    writer.write(post(slow) + b"".join(pieces))
    await until(lambda: connection._reading_paused)
    assert sum(cycle.unread_bytes for cycle in connection._waiting) < 3 * BODY_READ_AHEAD_BYTES_MAX
    await until(lambda: door.server.server_state.total_requests == 5)
    writer.close()


def test_a_client_that_is_gone_before_it_is_taken_in_is_no_defect(tmp_path: Path) -> None:
    said_of_it: list[dict[str, Any]] = []

    async def comes_and_goes() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: said_of_it.append(context))
        async with running_door(tmp_path) as door:
            client = socket.create_connection(("127.0.0.1", door.port))  # blocks the loop, which takes it in only later
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            assert (await door.get("/health"))[0] == 200

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(comes_and_goes())
    assert said_of_it == []


async def test_when_connections_run_out_silent_ones_give_place_and_others_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "SILENT_SECONDS_MIN", 3600)
    async with running_door(tmp_path, connections_max=4) as door:
        await door.add_engine("replica-0")
        lines = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(4)]
        (asks, ask), (_, half), (silent, _), (quiet, _) = lines
        ask.write(CLOSE.replace(b"connection: close\r\n", b""))
        await asks.readuntil(b'{"status":"ok"}')
        half.write(CLOSE[:-1])
        await connections_of(door, 4)
        assert (await said(door, CLOSE)).startswith(b"HTTP/1.1 503")  # they may be about to speak
        monkeypatch.setattr(protocol, "SILENT_SECONDS_MIN", 0)
        others = []
        for reader in (lines[1][0], silent, quiet):
            others.append(await asyncio.open_connection("127.0.0.1", door.port))
            others[-1][1].write(CLOSE.replace(b"connection: close\r\n", b""))
            await others[-1][0].readuntil(b'{"status":"ok"}')
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
        ask.write(CLOSE)
        assert (await asks.read()).endswith(b'{"status":"ok"}')
        for _, writer in (*lines, *others):
            writer.close()
