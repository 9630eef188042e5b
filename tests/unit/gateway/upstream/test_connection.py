"""Connections to a replica, against a server whose every byte the test writes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.fleet import Replica, ReplicaState
from gateway.errors import ReplicaTooSlow
from gateway.settings import Settings
from gateway.upstream.connection import HEAD_BYTES_MAX, READ_AHEAD_BYTES_MAX, ConnectionBroke, EngineConnection
from gateway.upstream.pool import Upstream, UpstreamLost
from tests.unit.gateway.running_door import until

WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """Plays one script for each connection, the last one again and again."""

    replica: Replica
    upstream: Upstream
    scripts: list[Script] = field(default_factory=list)
    requests: list[bytes] = field(default_factory=list)
    connections: int = 0
    closed: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.closed += 1
            writer.close()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        return self.requests[-1]

    def says(self, *answers: bytes, close: bool = False) -> Script:
        """Answer one request after the other with these bytes."""

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for answer in answers:
                await self.request(reader)
                writer.write(answer)
                await writer.drain()
            if not close:
                await reader.read()

        return script

    async def post(self, body: bytes = b"{}") -> EngineConnection:
        return await self.upstream.post(self.replica, "/v1/completions", b"x-test: 1\r\n", [body])


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    path = str(tmp_path / "engine.sock")
    upstream = Upstream(Settings(run_dir=tmp_path))
    server = Server(Replica("replica-0", ReplicaState.READY, path, 1, 0, "", "cpu", ""), upstream)
    listener = await asyncio.start_unix_server(server.serve, path)
    yield server
    await upstream.close()
    listener.close()


async def body_of(connection: EngineConnection) -> bytes:
    parts = b""
    while part := await connection.read():
        parts += part
    return parts


async def never() -> None:
    raise AssertionError("nobody is behind")


async def test_a_connection_is_used_again_when_its_answer_was_read(server: Server) -> None:
    server.scripts = [server.says(WHOLE, CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")]
    for wanted in (b"hello", b"abcde"):
        answer = await server.post(b'{"a": 1}')
        assert (answer.head.status, await body_of(answer)) == (200, wanted)
        server.upstream.release(server.replica, answer)
    assert server.connections == 1
    assert server.requests[0] == (
        b'POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-test: 1\r\ncontent-length: 8\r\n\r\n{"a": 1}'
    )


async def test_a_connection_with_an_unread_answer_is_closed(server: Server) -> None:
    server.scripts = [server.says(WHOLE)]
    server.upstream.release(server.replica, await server.post())
    await until(lambda: server.closed == 1)
    assert await body_of(await server.post()) == b"hello"
    assert server.connections == 2


async def test_a_connection_that_the_replica_wants_closed_is_not_used_again(server: Server) -> None:
    server.scripts = [server.says(WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), WHOLE)]
    for _ in range(2):
        answer = await server.post()
        assert await body_of(answer) == b"hello"
        server.upstream.release(server.replica, answer)
    assert server.connections == 2


async def test_a_pooled_connection_that_was_closed_meanwhile_is_replaced(server: Server) -> None:
    async def drops_the_second(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await server.request(reader)
        writer.write(WHOLE)
        await server.request(reader)

    server.scripts = [drops_the_second, server.says(WHOLE)]
    for _ in range(2):
        answer = await server.post()
        assert await body_of(answer) == b"hello"
        server.upstream.release(server.replica, answer)
    assert server.connections == 2


async def test_an_answer_without_a_length_ends_with_its_connection(server: Server) -> None:
    server.scripts = [server.says(b"HTTP/1.1 200 OK\r\n\r\nto the end", close=True)]
    answer = await server.post()
    assert await body_of(answer) == b"to the end"
    assert not answer.reusable


async def test_spaces_behind_a_value_are_no_part_of_it(server: Server) -> None:
    server.scripts = [server.says(WHOLE.replace(b"\r\n\r\n", b"\r\nx-a: b \t\r\n\r\n"))]
    assert (await server.post()).head.lines == b"x-a: b\r\n"


async def test_an_interim_answer_is_passed_over(server: Server) -> None:
    final = WHOLE.replace(b"\r\n\r\n", b"\r\nx-a: b\r\n\r\n")
    server.scripts = [server.says(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + final)]
    answer = await server.post()
    assert (answer.head.status, answer.head.lines) == (200, b"x-a: b\r\n")
    assert await body_of(answer) == b"hello"


@pytest.mark.parametrize("said", [WHOLE[:-1], CHUNKED + b"3\r\nabc\r\n"], ids=["short", "no last chunk"])
async def test_an_answer_that_breaks_off_is_not_taken_for_whole(server: Server, said: bytes) -> None:
    server.scripts = [server.says(said, close=True)]
    answer = await server.post()
    with pytest.raises(ConnectionBroke):
        await body_of(answer)
    assert not answer.reusable


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"x" * HEAD_BYTES_MAX + b"\r\n\r\n",
        CHUNKED + b"zz\r\n",
        WHOLE.replace(b"200", b"099") + WHOLE,
        WHOLE.replace(b"HTTP/1.1", b"HTTP/2.0"),
        CHUNKED.replace(b"chunked", b"gzip, chunked") + b"3\r\nabc\r\n0\r\n\r\n",
        CHUNKED.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n") + b"0\r\n\r\n",
    ],
    ids=["nothing", "no HTTP", "an endless head", "no chunk", "no status", "another HTTP", "another coding", "two codings"],
)
async def test_a_replica_without_a_proper_head_is_not_tried_again(server: Server, said: bytes) -> None:
    server.scripts = [server.says(said, close=True)]
    with pytest.raises(UpstreamLost) as lost:
        await server.post()
    assert lost.value.sent
    assert server.connections == 1


async def test_an_absent_replica_is_lost_without_a_connection(server: Server, tmp_path: Path) -> None:
    server.replica = Replica("replica-1", ReplicaState.READY, str(tmp_path / "none.sock"), 1, 0, "", "cpu", "")
    with pytest.raises(UpstreamLost) as lost:
        await server.post()
    assert not lost.value.sent


async def test_bytes_that_nobody_asked_for_cost_the_connection(server: Server) -> None:
    server.scripts = [server.says(WHOLE + WHOLE)]
    with pytest.raises(UpstreamLost):
        await server.post()


async def test_a_silent_replica_is_too_slow_and_is_told(server: Server, tmp_path: Path) -> None:
    server.upstream = Upstream(Settings(run_dir=tmp_path, response_head_seconds_max=0.05))
    server.scripts = [server.says(b"")]
    with pytest.raises(ReplicaTooSlow):
        await server.post()
    await until(lambda: server.closed == 1)


async def test_a_replica_is_held_back_while_its_answer_is_not_read(server: Server) -> None:
    sent = 0

    async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await server.request(reader)
        size = 64 * READ_AHEAD_BYTES_MAX
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(64):
            writer.write(b"x" * READ_AHEAD_BYTES_MAX)
            await writer.drain()
            sent += 1

    server.scripts = [floods]
    answer = await server.post()
    settled, seen = 0, -1

    def stands_still() -> bool:
        nonlocal settled, seen
        settled, seen = (settled + 1 if sent == seen else 0), sent
        return settled > 10

    await until(stands_still)
    assert sent < 32
    assert len(await body_of(answer)) == 64 * READ_AHEAD_BYTES_MAX


async def test_a_pump_gives_every_byte_to_its_sink_and_waits_when_that_is_full(server: Server) -> None:
    parts = [b"%d;" % number * 1000 for number in range(200)]
    server.scripts = [server.says(CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n")]
    got: list[bytes] = []
    waits = 0

    def sink(data: bytes) -> bool:
        got.append(data)
        return len(got) % 2 == 0

    async def drained() -> None:
        nonlocal waits
        waits += 1
        await asyncio.sleep(0)

    answer = await server.post()
    await answer.pump(sink, drained)
    assert b"".join(got) == b"".join(parts)
    assert waits == (len(got) + 1) // 2
    assert answer.reusable


async def test_a_pump_raises_what_its_sink_raises(server: Server) -> None:
    server.scripts = [server.says(CHUNKED + b"3\r\nabc\r\n")]

    def sink(data: bytes) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await (await server.post()).pump(sink, never)


async def test_a_connection_whose_sink_failed_is_not_used_again_even_if_its_answer_is_whole(server: Server) -> None:
    server.scripts = [server.says(CHUNKED + b"3\r\nabc\r\n0\r\n\r\n")]

    def sink(data: bytes) -> bool:
        raise ZeroDivisionError

    answer = await server.post()
    with pytest.raises(ZeroDivisionError):
        await answer.pump(sink, never)
    assert not answer.reusable


async def test_a_pump_that_is_cancelled_closes_the_connection_with_its_release(server: Server) -> None:
    server.scripts = [server.says(CHUNKED)]
    answer = await server.post()
    pumping = asyncio.create_task(answer.pump(lambda data: True, never))
    await asyncio.sleep(0)
    pumping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pumping
    server.upstream.release(server.replica, answer)
    await until(lambda: server.closed == 1)
