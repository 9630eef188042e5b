"""What may be odd about an answer, by name: each changes a valid one."""

from __future__ import annotations

import random

from tests.unit.gateway.conformance.answer_streams import answer
from tests.unit.gateway.conformance.changes import Change, Choices, line, new_header
from tests.unit.gateway.conformance.message import Message, Stream
from tests.unit.gateway.conformance.oddities import MESSAGE_ODDITIES

_LINES: Choices = {
    "another version": [
        b"HTTP/1.2 200 OK", b"HTTP/2.0 200 OK", b"HTTP/3.0 200 OK", b"HTTP/0.9 200 OK", b"HTTP/1.9 200 OK",
    ],
    "a version that is none": [
        b"HTTP/1 200 OK", b"HTTP/11 200 OK", b"HTTP/1.10 200 OK", b"http/1.1 200 OK", b"XTTP/1.1 200 OK", b"HTTP/2 200 OK",
        b"200 OK", b"HTTP 200 OK", b"HTTP/1.1200 OK", b"ICY 200 OK", b"HTTP/1,1 200 OK",
    ],
    "a status line of another protocol": [b"RTSP/1.0 200 OK"],
    "a status that is none": [
        b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 2x0 OK", b"HTTP/1.1 -20 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 OK",
        b"HTTP/1.1 200OK", b"HTTP/1.1", b"HTTP/1.1 ", b"HTTP/1.1 0200 OK", b"HTTP/1.1 \xb2\xb2\xb2 OK",
    ],
    "a status below 100": [b"HTTP/1.1 000 x", b"HTTP/1.1 099 x", b"HTTP/1.1 001"],
    "a high status": [b"HTTP/1.1 600 x", b"HTTP/1.1 999 x", b"HTTP/1.1 418", b"HTTP/1.1 299 x"],
    "odd spaces in the status line": [b"HTTP/1.1  200 OK", b"HTTP/1.1\t200 OK", b"HTTP/1.1 200\tOK", b" HTTP/1.1 200 OK"],
    "an odd reason": [b"HTTP/1.1 200 a\x00b", b"HTTP/1.1 200 a\x01b", b"HTTP/1.1 200 a\x0bb", b"HTTP/1.1 200 a\x7fb"],
    "a line end in the reason": [b"HTTP/1.1 200 a\rb", b"HTTP/1.1 200 a\nb"],
    "a request": [b"GET / HTTP/1.1", b"POST / HTTP/1.0"],
}  # fmt: skip
_HEADERS: Choices = {
    "an upgrade": [b"connection: upgrade\r\nupgrade: h2c", b"upgrade: h2c"],
}


def _interim(*before: bytes) -> Change:
    def change(source: random.Random, made: Message) -> None:
        made.before = source.choice(before)

    return change


def _behind(*behind: bytes) -> Change:
    def change(source: random.Random, made: Message) -> None:
        made.behind = source.choice(behind)

    return change


def _of_http_1_0(source: random.Random, made: Message) -> None:
    made.line = made.line.replace(b"HTTP/1.1", b"HTTP/1.0")
    if source.random() < 0.5:
        made.headers.append(b"connection: keep-alive")


def _switches(source: random.Random, made: Message) -> None:
    made.line = b"HTTP/1.1 101 Switching Protocols"
    made.headers += [b"connection: upgrade\r\nupgrade: h2c"] if source.random() < 0.5 else []


ANSWER_ODDITIES: dict[str, Change] = {
    **MESSAGE_ODDITIES,
    **{name: line(values) for name, values in _LINES.items()},
    **{name: new_header(values) for name, values in _HEADERS.items()},
    "another protocol": _switches,
    "an interim answer that ends the connection": _interim(
        b"HTTP/1.1 100 Continue\r\nconnection: close\r\n\r\n", b"HTTP/1.0 100 Continue\r\n\r\n"
    ),
    "an answer before it with a status below 100": _interim(b"HTTP/1.1 099 x\r\ncontent-length: 5\r\n\r\nhello"),
    "an interim answer with a body": _interim(
        b"HTTP/1.1 100 Continue\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.1 102 x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ),
    "HTTP/1.0": _of_http_1_0,
    "bytes behind it": _behind(b"x", b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi", b"0\r\n\r\n", b"\x00", b" "),
    "an empty line behind it": _behind(b"\r\n", b"\n", b"\r\n\r\n"),
}


def odd_answer(source: random.Random, *names: str) -> Stream:
    """An answer with these oddities."""
    made = answer(source)
    for name in names:
        ANSWER_ODDITIES[name](source, made)
    return Stream(made.sent(), frozenset(names))
