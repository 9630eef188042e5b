"""What may be odd about a request, by name: each changes a valid one."""

from __future__ import annotations

import random

from tests.unit.gateway.conformance.changes import Change, Choices, framing, line, new_header, without_body
from tests.unit.gateway.conformance.message import Message, Stream
from tests.unit.gateway.conformance.oddities import MESSAGE_ODDITIES
from tests.unit.gateway.conformance.request_streams import SENTINEL, message

HEAD_BYTES_MAX = 8192
"""The bound on a head that the server under test is given."""

_HEADERS: Choices = {
    "a second host": [b"host: evil", b"HOST: localhost:8000"],
    "Expect": [b"expect: 100-continue", b"Expect: 100-Continue", b"expect: 200-ok", b"expect:", b"expect: 100-continue, x"],
    "an upgrade": [
        b"connection: upgrade\r\nupgrade: h2c", b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nhttp2-settings: AA",
    ],
    "an upgrade that is not meant": [b"upgrade: websocket", b"connection: upgrade", b"connection: x-a\r\nupgrade: h2c"],
}  # fmt: skip
_LINES: Choices = {
    "two spaces in the request line": [
        b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET /  x HTTP/1.1",
    ],
    "tabs in the request line": [b"GET\t/ HTTP/1.1", b"GET /\tHTTP/1.1", b"GET\t/\tHTTP/1.1"],
    "no version": [b"GET /", b"GET / ", b"GET", b""],
    "a version that is none": [
        b"GET / http/1.1", b"GET / HTTP/1", b"GET / HTTP/11", b"GET / HTTP/1.1x", b"GET / HTTP/1.10", b"GET / HTTP 1.1",
        b"GET / XTTP/1.1", b"GET / HTTP/1,1", b"GET / HTTP/-1.1", b"GET / HTTP/1.\xb2", b"GET / HTTP/01.1",
    ],
    "another version": [
        b"GET / HTTP/1.2", b"GET / HTTP/2.0", b"GET / HTTP/3.0", b"GET / HTTP/0.9", b"GET / HTTP/1.9", b"GET / HTTP/2.1",
        b"GET /parts HTTP/0.9", b"POST /parts HTTP/2.0",
    ],
    "the preface of HTTP/2": [b"PRI * HTTP/2.0"],
    "a method that nobody knows": [
        b"BREW / HTTP/1.1", b"get / HTTP/1.1", b"GETX / HTTP/1.1", b"G / HTTP/1.1", b"M-A / HTTP/1.1", b"QUERYX / HTTP/1.1",
    ],
    "a method that is none": [
        b"G(T / HTTP/1.1", b"GET\x00 / HTTP/1.1", b"\xe4 / HTTP/1.1", b"G\rT / HTTP/1.1", b"\x16\x03\x01 / HTTP/1.1",
    ],
    "a line of another protocol": [
        b"GET / RTSP/1.0", b"GET / ICE/1.0", b"DESCRIBE /a RTSP/1.0", b"SOURCE /a ICE/1.0", b"PLAY /a HTTP/1.1",
        b"SOURCE /a HTTP/1.1", b"SETUP / HTTP/1.1",
    ],
    "a method of WebDAV and the like": [
        b"PROPFIND / HTTP/1.1", b"M-SEARCH / HTTP/1.1", b"PURGE / HTTP/1.1", b"TRACE / HTTP/1.1", b"LINK / HTTP/1.1",
        b"QUERY / HTTP/1.1",
    ],
    "a target of bytes beyond ASCII": [b"GET /\xe4 HTTP/1.1", b"GET /\xc3\xa4?\xff HTTP/1.1", b"GET /a?\xe4 HTTP/1.1"],
    "a control character in a target": [
        b"GET /\x00 HTTP/1.1", b"GET /a\x01b HTTP/1.1", b"GET /a\x7fb HTTP/1.1", b"GET /a\x0bb HTTP/1.1",
        b"GET /a?\x1f HTTP/1.1",
    ],
    "a line end in a target": [b"GET /a\nb HTTP/1.1", b"GET /a\rb HTTP/1.1", b"GET /a\r\nb HTTP/1.1"],
    "a fragment": [b"GET /a#b HTTP/1.1", b"GET /a?b#c HTTP/1.1", b"GET /#?x HTTP/1.1", b"GET http://h/a#b HTTP/1.1"],
    "no target": [b"GET HTTP/1.1", b"GET  HTTP/1.1"],
    "an absolute target without a path": [
        b"GET http://host HTTP/1.1", b"GET http://host:80 HTTP/1.1", b"GET http://host?x=1 HTTP/1.1",
    ],
    "an absolute target": [
        b"GET http://host/ HTTP/1.1", b"GET https://host:443/a?b HTTP/1.1", b"GET http://u:p@host/a HTTP/1.1",
        b"GET http://[::1]:80/a HTTP/1.1",
    ],
    "an absolute target that is none": [
        b"GET http:///a HTTP/1.1", b"GET http:/a HTTP/1.1", b"GET http//a HTTP/1.1", b"GET http://h:99999/ HTTP/1.1",
        b"GET http://h:/a HTTP/1.1", b"GET http://[::1/a HTTP/1.1", b"GET http://a b/ HTTP/1.1",
    ],
    "a target of another scheme": [
        b"GET ftp://h/a HTTP/1.1", b"GET file:///a HTTP/1.1", b"GET x://h/a HTTP/1.1", b"GET javascript:1 HTTP/1.1",
    ],
    "a target of all": [b"OPTIONS * HTTP/1.1", b"GET * HTTP/1.1", b"OPTIONS *x HTTP/1.1"],
    "a target that is none": [
        b"GET a HTTP/1.1", b"GET ?a HTTP/1.1", b"GET a:80 HTTP/1.1", b"GET \\a HTTP/1.1", b"GET {a} HTTP/1.1",
        b"GET #a HTTP/1.1", b"GET @a HTTP/1.1", b"GET .. HTTP/1.1",
    ],
    "odd characters in a target": [
        b"GET /{a}|\\^`<>\" HTTP/1.1", b"GET /%zz%0 HTTP/1.1", b"GET /%00%0d%0a HTTP/1.1", b"GET /a?b?c?[] HTTP/1.1",
        b"GET /[a]@: HTTP/1.1",
    ],
    "a tunnel": [b"CONNECT host:443 HTTP/1.1", b"CONNECT / HTTP/1.1", b"CONNECT host HTTP/1.1"],
}  # fmt: skip


def _is_of(version: bytes, *headers: bytes) -> Change:
    def change(source: random.Random, made: Message) -> None:
        made.line = made.line[: -len(b"HTTP/1.1")] + version
        made.headers += [line for line in headers if source.random() < 0.5]

    return change


def _of_http_1_0_in_chunks(source: random.Random, made: Message) -> None:
    framing([b"transfer-encoding: chunked"], is_chunked=True)(source, made)
    _is_of(b"HTTP/1.0", b"connection: keep-alive")(source, made)


def _no_host(source: random.Random, made: Message) -> None:
    made.headers = [line for line in made.headers if not line.lower().startswith(b"host")]


def _other_host(source: random.Random, made: Message) -> None:
    _no_host(source, made)
    made.headers.append(source.choice([b"host:", b"host: a b", b"host: a/b", b"host: a@b", b"host: a,b", b"host: \xe4"]))


def _head_is_large(source: random.Random, made: Message) -> None:
    size = source.choice([1000, 4000, 7000])
    if source.random() < 0.5:
        made.headers.append(b"x-large: " + b"x" * size)
    else:
        made.headers += [b"x-%d: y" % number for number in range(size // 10)]


def _head_is_too_large(source: random.Random, made: Message) -> None:
    if source.random() < 0.3:
        made.line = b"GET /" + b"x" * HEAD_BYTES_MAX + b" HTTP/1.1"
    elif source.random() < 0.5:
        made.headers.append(b"x-large: " + b"x" * HEAD_BYTES_MAX)
    else:
        made.headers += [b"x-%d: y" % number for number in range(HEAD_BYTES_MAX // 8)]


def _body_is_longer(source: random.Random, made: Message) -> None:
    without_body(made)
    made.headers.append(b"content-length: 2")
    made.body = b"hello"


ODDITIES: dict[str, Change] = {
    **MESSAGE_ODDITIES,
    **{name: new_header(values) for name, values in _HEADERS.items()},
    **{name: line(values) for name, values in _LINES.items()},
    "HTTP/1.0": _is_of(b"HTTP/1.0", b"connection: keep-alive", b"expect: 100-continue"),
    "chunks in HTTP/1.0": _of_http_1_0_in_chunks,
    "no host": _no_host,
    "a host that is none": _other_host,
    "a body longer than its length": _body_is_longer,
    "a large head": _head_is_large,
    "a head that is too large": _head_is_too_large,
}


def odd_stream(source: random.Random, *names: str) -> Stream:
    """A stream with these oddities in one of its requests, often behind a valid one, and another request behind it."""
    made = message(source)
    for name in names:
        ODDITIES[name](source, made)
    before = message(source).sent() if source.random() < 0.3 else b""
    return Stream(before + made.sent() + SENTINEL, frozenset(names))
