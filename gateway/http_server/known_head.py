"""Recognises a request head that was parsed before: on a connection, clients repeat it except for the body's length.

Two heads are the same if no byte differs except the digits of the content-length. Then the result of parsing the first also
holds for the second, and so does the place where the body begins.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.http_server.head_fields import HeadFields
from gateway.http_server.request_cycle import RawHeaders, Scope

HEAD_BYTES_MAX = 4096
"""Longer heads are not remembered, since each connection remembers one."""
_DIGITS_MAX = 15
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,%d})\r\n" % _DIGITS_MAX, re.IGNORECASE)


class Cut(NamedTuple):
    """A head without the digits of its content-length, which is at `place` of its headers."""

    prefix: bytes
    suffix: bytes
    place: int


def cut_head(data: bytes, headers: RawHeaders) -> Cut | None:
    """Cut the head that `data` begins with, parsed into `headers`; None unless it is complete, short, with one plain length."""
    end = data.find(_HEAD_END, 0, HEAD_BYTES_MAX)
    names = [name for name, _ in headers]
    if end < 0 or names.count(b"content-length") != 1 or b"transfer-encoding" in names:
        return None
    head = data[: end + len(_HEAD_END)]
    lengths = list(_LENGTH.finditer(head))
    place = names.index(b"content-length")
    if len(lengths) != 1 or lengths[0][1] != headers[place][1]:
        return None
    return Cut(head[: lengths[0].start(1)], head[lengths[0].end(1) :], place)


class HeadBytes:
    """A head that can be recognised."""

    __slots__ = ("_digits_start", "_prefix", "_suffix")

    def __init__(self, cut: Cut) -> None:
        self._prefix, self._suffix, _ = cut
        self._digits_start = len(cut.prefix)

    def body_starts(self, data: bytes) -> int | None:
        """Where the body begins in `data`; None if it does not begin with such a head, complete."""
        if not data.startswith(self._prefix):
            return None
        start = self._digits_start
        end = data.find(b"\r", start, start + _DIGITS_MAX + 1)
        if end < 0 or not data[start:end].isdigit() or not data.startswith(self._suffix, end):
            return None
        return end + len(self._suffix)

    def digits(self, data: bytes, start: int) -> bytes:
        """The content-length in the head that `data` begins with; `start` is what `body_starts` said."""
        return data[self._digits_start : start - len(self._suffix)]


class KnownHead(HeadBytes):
    """What was parsed of a head: all of its scope but for the length in `headers`, which is at `place`, and its `fields`."""

    __slots__ = ("_headers", "_place", "_scope", "fields")

    def __init__(self, cut: Cut, scope: Scope) -> None:
        super().__init__(cut)
        self._place, self._scope = cut.place, dict(scope)
        self._headers: RawHeaders = list(scope["headers"])
        self.fields = HeadFields.of(self._headers)

    @classmethod
    def of(cls, data: bytes, scope: Scope) -> KnownHead | None:
        """Remember the head that `data` begins with, parsed into `scope`; None if it may mean something else next time.

        The caller guarantees that it is HTTP/1.1, is kept alive, asks for no upgrade and expects no "100 Continue".
        """
        cut = cut_head(data, scope["headers"])
        return None if cut is None else cls(cut, scope)

    def scope(self, data: bytes, start: int) -> tuple[Scope, int]:
        """The scope of the request that `data` begins with and its body's length; `start` is what `body_starts` said."""
        digits = self.digits(data, start)
        headers = self._headers.copy()
        headers[self._place] = (b"content-length", digits)
        scope = self._scope.copy()
        scope["headers"] = headers
        return scope, int(digits)
