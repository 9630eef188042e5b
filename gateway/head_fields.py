"""What the front door wants to know of a request's headers."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from gateway.request_ids import sane_id

_JSON = b"application/json"

Headers = Iterable[tuple[bytes, bytes]]


class HeadFields(msgspec.Struct, frozen=True):
    """Of a header that occurs twice the last one counts. `is_json` tells of the body's type, `accept_line` is for the replica,
    `request_id` the client's own if it is harmless."""

    authorization: bytes | None
    is_json: bool
    accept_line: bytes
    pinned: str | None
    request_id: str | None

    @classmethod
    def of(cls, headers: Headers) -> HeadFields:
        """Look at a request's headers, names in lower case."""
        header = dict(headers).get
        kind, accept, pinned = header(b"content-type", b""), header(b"accept"), header(b"x-peerkv-replica")
        return cls(
            header(b"authorization"),
            kind == _JSON or kind.partition(b";")[0].strip().lower() == _JSON,
            b"accept: %b\r\n" % accept if accept else b"",
            None if pinned is None else pinned.decode("latin-1"),
            sane_id(header(b"x-request-id")),
        )


def content_length(headers: Headers) -> int:
    """How many bytes of body a request announces, 0 if it does not or not in digits."""
    length = dict(headers).get(b"content-length", b"")
    return int(length.lstrip(b"0") or b"0") if length.isdigit() else 0
