"""A head's bytes, to know it again when it comes with another content-length.

A head is the same if not one byte of it differs, the digits of its content-length aside. What was parsed of the one is then
what would be parsed of the other, and the body's place follows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gateway.cycle import RawHeaders

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
    """Cut the head that `data` begins with, parsed into `headers`; None if it is not whole, too long, or its length is not
    given once and plainly."""
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
    """A head that can be known again."""

    __slots__ = ("_digits_start", "_prefix", "_suffix")

    def __init__(self, cut: Cut) -> None:
        self._prefix, self._suffix, _ = cut
        self._digits_start = len(cut.prefix)

    def body_starts(self, data: bytes) -> int | None:
        """Where the body begins in `data`; None if it does not begin with such a head, whole."""
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
