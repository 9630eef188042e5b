"""A request or an answer in parts, before it becomes bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Stream(NamedTuple):
    """Bytes, and the names of what is odd about them."""

    data: bytes
    oddities: frozenset[str]


@dataclass
class Message:
    """A message in parts, for an oddity to change. `line` is the first one."""

    line: bytes
    headers: list[bytes] = field(default_factory=list)
    chunks: list[bytes] | None = None
    body: bytes = b""
    last_chunk: bytes = b"0\r\n"
    trailers: list[bytes] = field(default_factory=list)
    before: bytes = b""
    line_end: bytes = b"\r\n"
    head_end: bytes = b"\r\n"
    behind: bytes = b""

    def sent(self) -> bytes:
        """All of its bytes."""
        end = self.line_end
        head = self.before + self.line + end + b"".join(line + end for line in self.headers) + self.head_end
        if self.chunks is None:
            return head + self.body + self.behind
        trailers = b"".join(line + b"\r\n" for line in self.trailers)
        return head + b"".join(self.chunks) + self.last_chunk + trailers + b"\r\n" + self.behind


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    """Data as a chunk."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)
