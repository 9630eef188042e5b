"""What the front door needs from a request's headers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

import msgspec

_JSON = b"application/json"

# W3C Trace Context: vLLM's spans become children of the client's.
_PASSED = (b"accept", b"traceparent", b"tracestate")

Headers = Iterable[tuple[bytes, bytes]]


class HeadFields(msgspec.Struct, frozen=True):
    """Those that say who calls and what the body is occur once (head_rules.py). `authorization` may have come as x-api-key.
    `is_json` tells of the body's type, `passed_lines` are for the replica, `request_id` is the client's own if it is harmless;
    `encoding` is how the body is compressed, if it is."""

    authorization: bytes | None
    is_json: bool
    passed_lines: bytes
    wanted_replica: str | None
    request_id: str | None
    encoding: bytes | None
    host: bytes | None
    timeout: bytes | None
    traceparent: bytes | None = None
    quality: bytes | None = None

    @classmethod
    def of(cls, headers: Headers) -> HeadFields:
        """Look at a request's headers, names in lower case."""
        header = dict(headers).get
        kind, wanted = header(b"content-type", b""), header(b"x-peerkv-replica")
        return cls(
            header(b"authorization") or _as_bearer(header(b"x-api-key")),
            kind == _JSON or kind.partition(b";")[0].strip().lower() == _JSON,
            b"".join([b"%b: %b\r\n" % (name, value) for name in _PASSED if (value := header(name))]),
            None if wanted is None else wanted.decode("latin-1"),
            sane_id(header(b"x-request-id")),
            None if (encoding := header(b"content-encoding")) in (None, b"", b"identity") else encoding,
            header(b"host"),
            header(b"x-request-timeout"),
            header(b"traceparent"),
            header(b"x-peerkv-quality"),
        )


def _as_bearer(key: bytes | None) -> bytes | None:
    """The header by which clients of Anthropic's API send their key, as the one by which those of OpenAI's do."""
    return None if not key else b"Bearer " + key


def content_length(headers: Headers) -> int:
    """The announced length of the body in bytes, 0 without one or if it is not a number."""
    length = dict(headers).get(b"content-length", b"")
    return int(length.lstrip(b"0") or b"0") if length.isdigit() else 0


_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


_ID_BYTES = 16


_DRAWN_AT_ONCE = 256


def _random_ids() -> Iterator[str]:
    """An endless supply of ids of 32 hex digits, drawn in bulk: a call into the kernel for each would cost the most."""
    while True:
        digits = os.urandom(_ID_BYTES * _DRAWN_AT_ONCE).hex()
        for start in range(0, len(digits), 2 * _ID_BYTES):
            yield digits[start : start + 2 * _ID_BYTES]


_fresh = _random_ids()


def sane_id(given: bytes | None) -> str | None:
    """The client's request id if there is one and it is harmless."""
    return given.decode("ascii") if given is not None and _SANE_ID.fullmatch(given) else None


def fresh_id() -> str:
    """A new id of 32 hex digits."""
    return next(_fresh)


def sane_request_id(given: bytes | None) -> str:
    """The client's request id if it is harmless, else a new one."""
    return sane_id(given) or fresh_id()
