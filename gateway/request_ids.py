"""Request ids: the client's own if it is harmless, else a new one that nobody can guess."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_ID_BYTES = 16
_DRAWN_AT_ONCE = 256


def _random_ids() -> Iterator[str]:
    """Ids of 32 hex digits without end. Asking the kernel for each alone costs more than all else about an id."""
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
