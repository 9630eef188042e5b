"""Replicas' valid answers: as h11 writes them, and as others may."""

from __future__ import annotations

import random

import h11

from tests.unit.gateway.conformance.message import Message, chunk

_STATUSES = [
    b"200 OK",
    b"200 OK",
    b"200 OK",
    b"200",
    b"200 ",
    b"400 Bad Request",
    b"404 Not Found",
    b"503 Service \xc3\xbc",
    b"599 x",
]
_BODILESS = [b"204 No Content", b"304 Not Modified"]
_HEADERS = [
    b"date: Sun, 22 Nov 2026 10:00:00 GMT", b"server: uvicorn", b"Content-Type: application/json", b"x-Empty:",
    b"x-trailing: a \t", b"content-type: text/event-stream; charset=utf-8", b"x-obs: \xe4", b"Retry-After: 1", b"x-a: 1",
    b"X-A: 2", b"keep-alive: timeout=5", b"connection: keep-alive", b"Connection: close", b"x-colon: a:b",
    b"x-request-id: abc", b"vary: a, b",
]  # fmt: skip
_INTERIM = [
    b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: a\r\nx-a: b\r\n\r\n",
    b"HTTP/1.1 102 x\r\ncontent-length: 5\r\n\r\n", b"HTTP/1.1 102 x\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 199\r\n\r\n",
]  # fmt: skip
_EXTENSIONS = [b"", b"", b"", b";a", b";a=b", b';a="b c"']
_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Sun, 22 Nov 2026 10:00:0%d GMT\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n"
)


def answer(source: random.Random) -> Message:
    """A valid answer whose end can be told without the connection's."""
    made = Message(b"HTTP/1.1 " + source.choice(_STATUSES), [b"x-first: 1", *source.sample(_HEADERS, source.randint(0, 4))])
    body = source.randbytes(source.choice([0, 1, 5, 30, 300]))
    if source.random() < 0.5:
        made.headers.append(b"Content-Length: %d" % len(body))
        made.body = body
    else:
        made.headers.append(source.choice([b"Transfer-Encoding: chunked", b"transfer-encoding:\tChunked "]))
        cuts = sorted(source.sample(range(len(body)), min(len(body), source.choice([0, 1, 3]))))
        parts = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        made.chunks = [chunk(part, source.choice(_EXTENSIONS)) for part in parts if part]
        made.last_chunk = source.choice([b"0\r\n", b"0\r\n", b"00\r\n", b"0;a=b\r\n"])
        made.trailers = source.choice([[], [], [b"x-sum: 1"], [b"x-first: 2", b"content-type: text/event-stream"]])
    source.shuffle(made.headers)
    if source.random() < 0.15:
        made.before = b"".join(source.choices(_INTERIM, k=source.randint(1, 3)))
    return made


def answer_without_end(source: random.Random) -> bytes:
    """An answer that goes to the connection's end."""
    made = answer(source)
    version = source.choice([b"1.1", b"1.0"])
    headers = source.sample(_HEADERS, 2)
    return made.before + b"\r\n".join(
        [b"HTTP/%b 200 OK" % version, *headers, b"", source.randbytes(source.choice([0, 1, 300]))]
    )


def answer_without_body(source: random.Random) -> bytes:
    """An answer that can have no body, whatever its head says."""
    framing = source.choice([[], [b"content-length: 0"], [b"content-length: 5"], [b"transfer-encoding: chunked"]])
    return b"\r\n".join([b"HTTP/1.1 " + source.choice(_BODILESS), b"x-a: b", *framing, b"", b""])


def answer_like_the_last(source: random.Random) -> bytes:
    """What a replica sends again and again: of its head only the length and sometimes the date is another."""
    body = source.randbytes(source.choice([0, 1, 9, 10, 123]))
    return _HEAD % (source.random() < 0.2, len(body)) + body


def answers_with_one_head(source: random.Random) -> list[bytes]:
    """What a connection may answer if of its head only the length is ever another, with as many bytes as it says or more."""
    status = source.choice([b"200 OK", b"200 OK", b"204 No Content", b"304 Not Modified"])
    answers = []
    for _ in range(source.randint(2, 6)):
        size = source.choice([0, 1, 5, 12])
        length = (
            b"%d" % size if source.random() < 0.85 else source.choice([b"%d " % size, b"0%d" % size, b"+1", b"-1", b"1_0", b""])
        )
        has_body = status == b"200 OK" or source.random() < 0.2
        answers.append(_HEAD.replace(b"200 OK", status).replace(b"%d GMT", b"1 GMT").replace(b"%d", length))
        answers[-1] += source.randbytes(size) * has_body + b"more" * (source.random() < 0.05)
    return answers


def answer_by_h11(source: random.Random) -> bytes:
    """An answer in h11's hand."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    while not isinstance(connection.next_event(), h11.EndOfMessage):
        pass
    written = b""
    if source.random() < 0.3:
        written += connection.send(h11.InformationalResponse(status_code=103, headers=[(b"link", b"a")]))
    body = [source.randbytes(source.choice([1, 5, 300])) for _ in range(source.randint(0, 3))]
    headers = [(b"Date", b"today"), (b"X-A", b"b")]
    has_length = source.random() < 0.5
    if has_length:
        headers.append((b"Content-Length", b"%d" % sum(map(len, body))))
    written += connection.send(h11.Response(status_code=source.choice([200, 404, 500]), headers=headers)) or b""
    for part in body:
        written += connection.send(h11.Data(data=part)) or b""
    trailers = [] if has_length else source.choice([[], [(b"x-sum", b"1")]])
    return written + (connection.send(h11.EndOfMessage(headers=trailers)) or b"")


def valid_answer(source: random.Random) -> bytes:
    """Any of them."""
    kinds = [
        answer_by_h11,
        answer_like_the_last,
        answer_like_the_last,
        answer_without_body,
        lambda source: answer(source).sent(),
    ]
    return source.choice(kinds)(source)
