"""Clients' streams of valid requests."""

from __future__ import annotations

import random

from tests.unit.gateway.conformance.message import Message, Stream, chunk

SENTINEL = b"GET /next?n=1 HTTP/1.1\r\nhost: next\r\nx-next: yes\r\n\r\n"
"""Follows a stream, to show where the message before it ends."""


_TARGETS = [
    b"/", b"/v1/completions", b"/a/parts", b"/a%20b?x=%31&y", b"/?q=a?b", b"//two/slashes", b"/a;b=c/../d", b"/parts?x={}|",
    b"http://host:8000/v1/x?y=1", b"HTTP://host/parts", b"/~a'(b)*!$", b"/?", b"/a?b=/c://d",
]  # fmt: skip
_HEADERS = [
    b"accept: */*", b"Accept:text/plain", b"X-Empty:", b"x-blank:  \t ", b"x-tab:\ta\tb\t", b"x-trailing: a  ", b"X-A: 1",
    b"x-a: 2", b"x-obs: \xe4\xff", b"x-colon: a:b: c", b"authorization: Bearer a.b-c", b"Content-Type: application/json",
    b"x!#$%&'*+.^_`|~: y", b"x-request-id: abc", b"x-quote: \"a, b\"", b"cookie: a=b; c=d", b"te: trailers",
    b"user-agent: test/1.0 (x)",
]  # fmt: skip
_CONNECTIONS = [
    b"connection: keep-alive", b"Connection: Keep-Alive", b"connection: close", b"Connection: CLOSE",
    b"connection: x-a, close", b"connection: close, x-a", b"connection: keep-alive, close", b"connection: x-a",
    b"connection:", b"connection: closed", b"keep-alive: timeout=5",
]  # fmt: skip
_METHODS = [b"GET", b"HEAD", b"OPTIONS", b"DELETE", b"POST", b"PUT", b"PATCH", b"POST", b"POST"]
_CODINGS = [b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED", b"TRANSFER-ENCODING:\tChunked "]
_EXTENSIONS = [b"", b"", b"", b";a", b";a=b", b';a="b c"', b";a=b;c=d", b";" + b"e" * 40]


def message(source: random.Random) -> Message:
    """A valid request."""
    made = Message(b"%b %b HTTP/1.1" % (source.choice(_METHODS), source.choice(_TARGETS)), [b"Host: localhost:8000"])
    made.headers += source.sample(_HEADERS, source.randint(0, 4))
    if source.random() < 0.15:
        made.headers.append(source.choice(_CONNECTIONS))
    body = source.randbytes(source.choice([0, 1, 5, 30, 300]))
    kind = source.random()
    if kind < 0.4:
        made.headers.append(b"Content-Length: %d" % len(body))
        made.body = body
    elif kind < 0.7:
        made.headers.append(source.choice(_CODINGS))
        cuts = sorted(source.sample(range(len(body)), min(len(body), source.choice([0, 1, 3]))))
        made.chunks = [
            chunk(part, source.choice(_EXTENSIONS))
            for part in (body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True))
            if part
        ]
        made.last_chunk = source.choice([b"0\r\n", b"0\r\n", b"000\r\n", b"0;a=b\r\n"])
        made.trailers = source.choice([[], [], [], [b"x-sum: 1"], [b"Host: other", b"x-a:", b"authorization: Bearer x"]])
    source.shuffle(made.headers)
    return made


def requests_with_one_head(source: random.Random) -> list[bytes]:
    """A connection's requests if of their head only the length is ever another, or is none."""
    made = message(source)
    made.headers = [line for line in made.headers if not line.lower().startswith((b"content-", b"transfer-", b"connection"))]
    made.headers.insert(
        source.randint(0, len(made.headers)), source.choice([b"Content-Length: LENGTH", b"content-length:LENGTH"])
    )
    made.chunks, made.body = None, b""
    requests = []
    for _ in range(source.randint(2, 6)):
        size = source.choice([0, 1, 5, 12, 300])
        length = (
            b"%d" % size if source.random() < 0.9 else source.choice([b"%d " % size, b"0%d" % size, b"+1", b"-1", b"1_0", b""])
        )
        requests.append(made.sent().replace(b"LENGTH", length) + source.randbytes(size))
    return requests


def valid_stream(source: random.Random) -> Stream:
    """One request or several, each behind the other."""
    whole = b"".join(message(source).sent() for _ in range(source.choice([1, 1, 2, 3])))
    return Stream(whole + SENTINEL, frozenset())
