"""Answers whose head was parsed before: what comes of them is the same as if each head had been parsed anew."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from gateway.upstream.answer_head import AnswerHead, KnownAnswer
from gateway.upstream.connection import ConnectionBroke, EngineConnection

HEAD = b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 10:00:00 GMT\r\nContent-Length: %d\r\nContent-Type: application/json\r\n\r\n"
HEADERS = [(b"date", b"Sun, 22 Nov 2026 10:00:00 GMT"), (b"content-length", b"5"), (b"content-type", b"application/json")]
INTERIM = b"HTTP/1.1 103 Early Hints\r\nx: y\r\n\r\n"
ODD = [
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nto the end",
    INTERIM + HEAD % 2 + b"hi",
    INTERIM.replace(b"x: y", b"content-length: 5") + HEAD % 5 + b"hello",
    HEAD.replace(b"1.1", b"1.0") % 2 + b"hi",
    HEAD.replace(b"date:", b"connection: close\r\ndate:") % 2 + b"hi",
    HEAD.replace(b"Content-Length: %d", b"Content-Length:  02") + b"hi",
    HEAD.replace(b"Content-Length: %d", b"Content-Length: 2x") + b"hi",
    HEAD.replace(b"Content-Length: %d", b"Content-Length: 2\r\nContent-Length: 3") + b"hi",
    HEAD % 2 + b"high",
    HEAD % 2 + b"hi" + HEAD % 2 + b"ho",
    HEAD % 2 + b"hi\r\n",
    b"\r\n" + HEAD % 2 + b"hi",
    b"nonsense\r\n\r\n",
]


class Replica:
    """The other end of a connection: it is written to in vain."""

    def __init__(self) -> None:
        self.closed = False

    def write(self, data: bytes) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0


async def said(connection: EngineConnection) -> Any:
    """What one request's answer is understood to be."""
    try:
        await connection.send(b"", [], 0)
        body = b""
        while part := await connection.read():
            body += part
    except ConnectionBroke as error:
        return str(error)
    head = connection.head
    return head.status, head.lines, head.is_event_stream, body, connection.reusable


async def understood(answers: list[list[bytes]]) -> list[Any]:
    """What these answers are understood to be, each in the pieces that come of it, on one connection until it cannot go on."""
    connection, replica = EngineConnection(asyncio.get_running_loop(), lambda _: None), Replica()
    connection.connection_made(replica)  # type: ignore[arg-type]
    found: list[Any] = []
    for pieces in answers:
        asking = asyncio.create_task(said(connection))
        await asyncio.sleep(0)
        for piece in pieces:
            if not replica.closed:
                connection.data_received(piece)
            await asyncio.sleep(0)
        if not asking.done():
            await asyncio.sleep(0)
            connection.connection_lost(None)
        found.append(await asking)
        if not connection.reusable:
            break
        connection.reset(0.0)
    return found


def answers_of(source: random.Random) -> list[list[bytes]]:
    """Answers that are much alike, and sometimes are not, or are none; mostly in one piece each."""
    heads = [HEAD, HEAD, HEAD, HEAD.replace(b"10:00:00", b"10:00:01"), HEAD.replace(b"200 OK", b"400 Bad Request")]
    answers = []
    for _ in range(source.randint(2, 8)):
        size = source.choice([0, 1, 5, 9, 10, 123])
        whole = source.choice(ODD) if source.random() < 0.1 else source.choice(heads) % size + source.randbytes(size)
        cuts = sorted(source.sample(range(1, len(whole)), source.choice([0, 0, 0, 1, 3])))
        answers.append([whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)])
    return answers


async def test_whatever_is_answered_is_understood_as_if_each_head_was_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random.Random(7)
    lengths = set()
    for _ in range(2000):
        answers = answers_of(source)
        with monkeypatch.context() as parsed:
            parsed.setattr(KnownAnswer, "of", lambda *_: None)
            wanted = await understood(answers)
        assert await understood(answers) == wanted, answers
        lengths.add(len(wanted))
    assert lengths >= {1, 2, 5, 8}


async def test_a_head_that_comes_again_is_not_parsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[bytes] = []
    parse = EngineConnection._parse
    monkeypatch.setattr(EngineConnection, "_parse", lambda self, data: (parsed.append(data), parse(self, data)))
    later = HEAD.replace(b"10:00:00", b"10:00:01")
    pieces = [HEAD % 5 + b"hello", HEAD % 11 + b"hello again", HEAD % 0, later % 3 + b"new", later % 3 + b"old"]
    found = await understood([[piece] for piece in pieces])
    assert [each[3] for each in found] == [b"hello", b"hello again", b"", b"new", b"old"]
    assert parsed == [pieces[0], pieces[3]]


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_an_answer_that_can_have_no_body_gets_none_when_its_head_comes_again(status: bytes) -> None:
    head = HEAD.replace(b"200 OK", status)
    found = await understood([[head % 0], [head % 5 + b"hello"]])
    assert found[0][3:] == (b"", True)
    assert "is not HTTP" in found[1]


async def test_the_rest_of_a_head_is_no_head() -> None:
    whole = HEAD % 5 + b"hello"
    found = await understood([[whole], [b"HTTP/1.1 200 OK\r\nx-a: ", whole]])
    assert found[1] == (200, b"x-a: HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n", False, b"hello", True)


async def test_a_known_answer_that_nobody_asked_for_breaks_the_connection() -> None:
    whole = HEAD % 5 + b"hello"
    connection, replica = EngineConnection(asyncio.get_running_loop(), lambda _: None), Replica()
    connection.connection_made(replica)  # type: ignore[arg-type]
    asking = asyncio.create_task(said(connection))
    await asyncio.sleep(0)
    connection.data_received(whole)
    await asking
    connection.reset(0.0)
    connection.data_received(whole)
    assert replica.closed
    assert "is not HTTP" in await said(connection)


@pytest.mark.parametrize(
    "data",
    [
        HEAD % 5 + b"hell",
        HEAD % 5 + b"hello!",
        HEAD.replace(b"200", b"201") % 5 + b"hello",
        HEAD.replace(b"%d", b"5 ") + b"hello",
        HEAD.replace(b"date", b"Date") % 5 + b"hello",
        (HEAD % 5)[:-1],
        INTERIM + HEAD % 5 + b"hello",
    ],
)
def test_any_other_answer_is_not_known(data: bytes) -> None:
    known = KnownAnswer.of(HEAD % 5 + b"hello", HEADERS, AnswerHead(200, HEADERS))
    assert known is not None
    assert known.body(HEAD % 12 + b"hello, again") == b"hello, again"
    assert known.body(data) is None


def test_an_interim_answer_is_not_taken_for_the_one_behind_it() -> None:
    data = INTERIM.replace(b"x: y", b"content-length: 5") + HEAD % 5 + b"hello"
    assert KnownAnswer.of(data, HEADERS, AnswerHead(200, HEADERS)) is None


def test_what_is_of_one_connection_only_is_not_passed_on() -> None:
    dropped = [b"connection", b"content-length", b"date", b"keep-alive", b"server", b"transfer-encoding", b"x-request-id"]
    dropped += [b"proxy-connection", b"trailer", b"upgrade"]
    head = AnswerHead(200, [(b"x-a", b"1"), *((name, b"x") for name in dropped), (b"x-b", b"2"), (b"x-a", b"3")])
    assert head.lines == b"x-a: 1\r\nx-b: 2\r\nx-a: 3\r\n"
    assert not head.is_event_stream
    assert AnswerHead(200, [(b"content-type", b"text/event-stream; charset=utf-8")]).is_event_stream
    named = [(b"connection", b"X-Hop, close"), (b"x-hop", b"1"), (b"x-a", b"1"), (b"connection", b"x-b"), (b"x-b", b"2")]
    assert AnswerHead(200, named).lines == b"x-a: 1\r\n"
