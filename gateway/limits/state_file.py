"""What was used up, on disk: so that a restart of the gateway gives nobody a new budget."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

import msgspec

from gateway.limits.account import AccountState

VERSION = 1
STATE_BYTES_MAX = 64 << 20
_logger = logging.getLogger(__name__)


class _State(msgspec.Struct):
    version: int
    keys: dict[str, AccountState]


class StateFile:
    """One gateway's file. Another gateway that names the same one is told so, and keeps its counts in memory alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: int | None = None
        self._complained = False
        self._writing = Lock()

    def open(self) -> Mapping[str, AccountState]:
        """Take the file, and read what is in it; nothing if it is another gateway's, or cannot be read, which is logged."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._give_up()
            why = "another gateway has it" if isinstance(error, BlockingIOError) else error.strerror
            _logger.error(
                "limits are counted in memory alone, and begin anew with a restart: %s: %s (limits_file)", self._path, why
            )
            return {}
        try:
            with self._path.open("rb") as file:
                found = msgspec.json.decode(file.read(STATE_BYTES_MAX), type=_State)
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            _logger.error("what was used up of limits begins anew: %s cannot be read: %s", self._path, error)
            return {}
        return found.keys if found.version == VERSION else {}

    @property
    def is_ours(self) -> bool:
        """Whether there is a file to write to."""
        return self._lock is not None

    def encode(self, keys: Mapping[str, AccountState]) -> bytes:
        """The file's content."""
        return msgspec.json.encode(_State(VERSION, dict(keys)))

    def write(self, content: bytes) -> None:
        """Replace the content, atomically; from any thread. What keeps it from being written is logged once."""
        with self._writing:
            if self._lock is not None:
                self._replace(content)

    def _replace(self, content: bytes) -> None:
        made = ""
        try:
            handle, made = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(made, self._path)
            self._complained = False
        except OSError as error:
            if made:
                with contextlib.suppress(OSError):
                    os.unlink(made)
            if not self._complained:
                self._complained = True
                _logger.error("what is used up of limits is not kept: %s: %s", self._path, error.strerror)

    def close(self) -> None:
        """Leave the file to the next gateway; what is still to be written by another thread is older, and is not."""
        with self._writing:
            self._give_up()

    def _give_up(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
