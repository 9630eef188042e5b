"""Ways to make a message odd: each makes a change that does it, with one of several values."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.unit.gateway.conformance.message import Message, chunk

Change = Callable[[random.Random, Message], None]
Choices = dict[str, list[bytes]]

_FRAMING = (b"content-length", b"transfer-encoding")


def new_header(values: list[bytes]) -> Change:
    """A header more, somewhere."""

    def change(source: random.Random, made: Message) -> None:
        made.headers.insert(source.randrange(len(made.headers) + 1), source.choice(values))

    return change


def without_body(made: Message) -> None:
    """Take the body away, and what announces it."""
    made.headers = [line for line in made.headers if line.partition(b":")[0].lower() not in _FRAMING]
    made.chunks, made.body = None, b""


def framing(values: list[bytes], *, is_chunked: bool) -> Change:
    """Other headers that say where the body ends: of five bytes, plain or in a chunk."""

    def change(source: random.Random, made: Message) -> None:
        without_body(made)
        made.line = made.line.replace(b"GET ", b"POST ").replace(b"HEAD ", b"POST ")
        made.headers.insert(source.randrange(len(made.headers) + 1), source.choice(values))
        if is_chunked:
            made.chunks = [chunk(b"hello")] if source.random() < 0.7 else []
        else:
            made.body = b"hello"

    return change


def chunked(values: list[bytes], place: str) -> Change:
    """A body in chunks, and one of the values among them, in place of the last one, or among the trailers."""

    def change(source: random.Random, made: Message) -> None:
        without_body(made)
        made.headers.append(b"transfer-encoding: chunked")
        made.chunks = [chunk(b"before"), chunk(b"behind")]
        value = source.choice(values)
        if place == "chunk":
            made.chunks.insert(source.randint(0, 2), value)
        elif place == "last":
            made.last_chunk = value
        else:
            made.trailers.insert(source.randint(0, len(made.trailers)), value)

    return change


def line(values: list[bytes]) -> Change:
    """Another first line."""

    def change(source: random.Random, made: Message) -> None:
        made.line = source.choice(values)

    return change


def lines_end_in(end: bytes) -> Change:
    """All lines of the head end so."""

    def change(source: random.Random, made: Message) -> None:
        made.line_end = end

    return change


def head_ends_in(*ends: bytes) -> Change:
    """The head's empty line is another."""

    def change(source: random.Random, made: Message) -> None:
        made.head_end = source.choice(ends)

    return change


def one_line_ends_in(end: bytes) -> Change:
    """The first header's line ends so."""

    def change(source: random.Random, made: Message) -> None:
        first, second = made.headers[0], b"x-last: 1"
        made.headers[0] = first + end + second

    return change


def begins_with(*before: bytes) -> Change:
    """Something comes before."""

    def change(source: random.Random, made: Message) -> None:
        made.before = source.choice(before)

    return change


def first_header_is_folded(source: random.Random, made: Message) -> None:
    """The first header continues the line before it."""
    made.headers[0] = source.choice([b" ", b"\t"]) + made.headers[0]
