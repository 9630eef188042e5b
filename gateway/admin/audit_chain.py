"""The audit log's lines: each has the hash of the one before, so that none can be changed or taken out unnoticed.

A chain cannot show that its end was cut off: keep the last hash elsewhere, and have `verify` look for it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from gateway.errors import GatewayError, SettingsError

FIRST = "0" * 64
"""What the first line has as the hash of the one before."""
_HASH = b',"hash":"'
_END = b'"}'


class ChainBroken(GatewayError):
    """A line is not what was written, or one is missing; the message says which."""


class Chain(NamedTuple):
    """`entries` lines, from the first to the last `time`; `hashes` of all of them."""

    entries: int = 0
    since: str = ""
    until: str = ""
    hashes: tuple[str, ...] = ()

    @property
    def last(self) -> str:
        """The last line's hash."""
        return self.hashes[-1] if self.hashes else FIRST


def line_of(number: int, previous: str, values: dict[str, Any]) -> tuple[bytes, str]:
    """A line with its end, and its hash."""
    body = msgspec.json.encode({"n": number, **values, "previous": previous})
    digest = hashlib.sha256(body).hexdigest()
    return b"%b%b%b%b\n" % (body[:-1], _HASH, digest.encode(), _END), digest


def check(lines: Iterable[bytes]) -> Chain:
    """The chain in these lines, with their ends. Raises ChainBroken."""
    count, since, until, previous = 0, "", "", FIRST
    hashes: list[str] = []
    for line in lines:
        count += 1
        body, found, rest = line.rpartition(_HASH)
        if not found or not rest.endswith(_END + b"\n"):
            raise ChainBroken(f"line {count} is cut off, or no entry")
        body += b"}"
        digest = hashlib.sha256(body).hexdigest()
        if rest[: -len(_END) - 1] != digest.encode():
            raise ChainBroken(f"line {count} was changed: its hash is that of something else")
        try:
            entry = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise ChainBroken(f"line {count} was put in: it is no entry") from None
        if entry.get("previous") != previous or entry.get("n") != count:
            raise ChainBroken(f"line {count} does not follow the one before: lines were taken out, put in or moved")
        previous, until = digest, entry.get("time", "")
        since = since or until
        hashes.append(digest)
    return Chain(count, since, until, tuple(hashes))


def verify(path: Path) -> Chain:
    """The chain in a file. Raises ChainBroken, OSError."""
    with path.open("rb") as file:
        return check(file)


class AuditLog:
    """Appends to a file of mode 0600, whose only writer it is. Raises SettingsError when that is not possible."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(f"audit_log: cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            chain = verify(path)
        except BlockingIOError:
            self.close()
            raise SettingsError(f"audit_log: another gateway writes {path}: each needs a file of its own") from None
        except ChainBroken as error:
            self.close()
            raise SettingsError(f"audit_log: {path}, {error}. Move the file away, and keep it") from None
        self._count, self._last = chain.entries, chain.last

    def add(self, values: dict[str, Any]) -> None:
        """Write an entry. Raises OSError, and then nothing of it stays."""
        line, digest = line_of(self._count + 1, self._last, values)
        size = os.fstat(self._descriptor).st_size
        try:
            if os.write(self._descriptor, line) < len(line):
                raise OSError("the disk is full")
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._count, self._last = self._count + 1, digest

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)
