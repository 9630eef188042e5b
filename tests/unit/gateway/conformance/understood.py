"""What an implementation of HTTP/1.1 makes of a stream of bytes, in a form in which two of them can be compared."""

from __future__ import annotations

import random
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

Headers = tuple[tuple[bytes, bytes], ...]


class End(Enum):
    """How a client's stream of requests ends."""

    OPEN = "more may come"
    CLOSED = "closed behind the last request"
    REFUSED = "refused"


class Request(NamedTuple):
    """A whole request. Of its target `path` and `query` are compared, since that is what an application gets."""

    method: bytes
    path: bytes
    query: bytes
    version: bytes
    headers: Headers
    body: bytes


class Requests(NamedTuple):
    """What a stream of requests is understood to be."""

    whole: tuple[Request, ...]
    end: End


class Answer(NamedTuple):
    """A whole answer, and whether its connection may be used for another request."""

    status: int
    headers: Headers
    body: bytes
    reusable: bool


BROKEN = "an error"
"""In the place of an Answer: the stream is none, or breaks off."""


def cut_target(target: bytes) -> tuple[bytes, bytes]:
    """A target's path and query, in whatever form it comes (RFC 9112, 3.2). A fragment is no part of either."""
    scheme, separator, rest = target.partition(b"://")
    if separator and scheme.isalpha():
        cut = min((at for at in map(rest.find, (b"/", b"?", b"#")) if at >= 0), default=len(rest))
        target = rest[cut:]
    path, _, query = target.partition(b"#")[0].partition(b"?")
    return path or b"/", query


def header_values(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Headers to compare. h11 gives a transfer coding's name in lower case."""
    return tuple((bytes(name), value.lower() if name == b"transfer-encoding" else bytes(value)) for name, value in headers)


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The stream, cut at these places in order."""
    return [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]


def some_pieces(source: random.Random, stream: bytes) -> list[bytes]:
    """The stream whole, or cut at a few places, or at each."""
    count = source.choice([0, 0, 1, 2, 4, 20])
    if source.random() < 0.05 and len(stream) < 1000:
        return pieces_of(stream, list(range(1, len(stream))))
    return pieces_of(stream, sorted(source.sample(range(1, len(stream)), min(count, len(stream) - 1))))
