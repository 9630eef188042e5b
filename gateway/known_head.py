"""A request's head that was parsed before: on a connection clients send the same one again, but for the body's length.

A head is the same if not one byte of it differs, the digits of its content-length aside. What was parsed of the one is then
what would be parsed of the other, and the body's place follows.
"""

from __future__ import annotations

import re

from gateway.cycle import RawHeaders, Scope

HEAD_BYTES_MAX = 4096
"""Longer heads are not remembered, since each connection remembers one."""
_DIGITS_MAX = 15
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,%d})\r\n" % _DIGITS_MAX, re.IGNORECASE)


class KnownHead:
    """What was parsed of a head: all of its scope but for the length in `headers`, which is at `place`."""

    __slots__ = ("_headers", "_place", "_prefix", "_scope", "_suffix")

    def __init__(self, prefix: bytes, suffix: bytes, scope: Scope, place: int) -> None:
        self._prefix, self._suffix, self._scope, self._place = prefix, suffix, dict(scope), place
        self._headers: RawHeaders = list(scope["headers"])

    @classmethod
    def of(cls, data: bytes, scope: Scope) -> KnownHead | None:
        """Remember the head that `data` begins with, parsed into `scope`; None for what may mean something else next time.

        The caller vouches that it is of HTTP/1.1, is kept alive, asks for no upgrade and expects no "100 Continue".
        """
        end = data.find(_HEAD_END, 0, HEAD_BYTES_MAX)
        names = [name for name, _ in scope["headers"]]
        if end < 0 or names.count(b"content-length") != 1 or b"transfer-encoding" in names:
            return None
        head = data[: end + len(_HEAD_END)]
        lengths = list(_LENGTH.finditer(head))
        place = names.index(b"content-length")
        if len(lengths) != 1 or lengths[0][1] != scope["headers"][place][1]:
            return None
        return cls(head[: lengths[0].start(1)], head[lengths[0].end(1) :], scope, place)

    def body_starts(self, data: bytes) -> int | None:
        """Where the body begins in `data`; None if it does not begin with such a head, whole."""
        if not data.startswith(self._prefix):
            return None
        start = len(self._prefix)
        end = data.find(b"\r", start, start + _DIGITS_MAX + 1)
        digits = data[start:end] if end > start else b""
        if not digits.isdigit() or not data.startswith(self._suffix, end):
            return None
        return end + len(self._suffix)

    def scope(self, data: bytes, start: int) -> tuple[Scope, int]:
        """The scope of the request that `data` begins with and its body's length; `start` is what `body_starts` said."""
        digits = data[len(self._prefix) : start - len(self._suffix)]
        headers = self._headers.copy()
        headers[self._place] = (b"content-length", digits)
        scope = self._scope.copy()
        scope["headers"] = headers
        return scope, int(digits)
