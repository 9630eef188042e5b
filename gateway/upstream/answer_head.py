"""The head of a replica's answer, and what the relay makes of it, worked out once for all answers with the same head."""

from __future__ import annotations

from gateway.http_server.known_head import Cut, HeadBytes, cut_head
from gateway.http_server.request_cycle import BODILESS, RawHeaders

_EVENT_STREAM = b"text/event-stream"
# Of one connection only, or set anew by our own server.
_DROPPED = frozenset(
    {
        b"connection",
        b"content-length",
        b"date",
        b"keep-alive",
        b"proxy-connection",
        b"server",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
    }
)


class AnswerHead:
    """An answer's status and what its headers, names in lower case, come to; `lines` are those that the client gets, as they
    are sent."""

    __slots__ = ("is_event_stream", "lines", "status")

    def __init__(self, status: int, headers: RawHeaders) -> None:
        self.status = status
        fields = dict(headers)
        self.is_event_stream = fields.get(b"content-type", b"").startswith(_EVENT_STREAM)
        dropped = _DROPPED if b"connection" not in fields else _DROPPED.union(_named_by_connection(headers))
        self.lines = b"".join([b"%b: %b\r\n" % header for header in headers if header[0] not in dropped])
        if self.is_event_stream and b"x-accel-buffering" not in fields:
            self.lines += b"x-accel-buffering: no\r\n"  # else nginx would gather events, and send them all at once


def _named_by_connection(headers: RawHeaders) -> list[bytes]:
    values = b",".join([value for name, value in headers if name == b"connection"])
    return [name.strip(b" \t") for name in values.lower().split(b",")]


class KnownAnswer(HeadBytes):
    """The head of an answer that came before, to know the next answer by. But for its length, and for its date each second,
    a replica sends the same one again."""

    __slots__ = ("head",)

    def __init__(self, cut: Cut, head: AnswerHead) -> None:
        super().__init__(cut)
        self.head = head

    @classmethod
    def of(cls, data: bytes, headers: RawHeaders, head: AnswerHead) -> KnownAnswer | None:
        """Remember the head of the answer that `data` is, parsed into `headers`; None for what may mean something else next
        time: only what is a head, so many bytes as it says, and no more, is remembered."""
        cut = cut_head(data, headers)
        if cut is None or head.status in BODILESS:  # no length says that these have a body
            return None
        known = cls(cut, head)
        return None if known.body(data) is None else known

    def body(self, data: bytes) -> bytes | None:
        """The body of the answer that `data` is; None if it has another head, or is not exactly one complete answer."""
        start = self.body_starts(data)
        if start is None or self.digits(data, start) != b"%d" % (len(data) - start):
            return None
        return data[start:]
