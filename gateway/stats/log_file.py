"""A file that lines are appended to beside the event loop: whoever puts a line never waits for the disk."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from gateway.errors import SettingsError

STDOUT = "-"
LINES_MAX = 16384
"""Lines that may wait to be written; further ones are dropped, and counted."""
FLUSH_SECONDS = 0.2
CLOSE_SECONDS_MAX = 2.0
"""For the last lines. A disk that does not answer keeps nobody from stopping."""
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # else a pipe that nobody reads were waited for

_logger = logging.getLogger(__name__)


class LogFile:
    """Appends lines to `path`, or to standard output where that is STDOUT. A thread writes what has come, in one piece.

    A file that was moved or removed, as logrotate does, is made anew. `put` belongs to one thread; `written` and `dropped`
    count lines.
    """

    def __init__(self, path: str, write: Callable[[int, bytes], int] = os.write) -> None:
        """Open the file. Raises SettingsError when that is not possible."""
        self.written = self.dropped = 0
        self._path = path
        self._write_bytes = write
        try:
            self._descriptor = os.dup(1) if path == STDOUT else _opened(path)
        except OSError as error:
            raise SettingsError(
                f"request_log: cannot write {path}: {error.strerror}. Name a file in a directory that this user may write to."
            ) from None
        self._lines: deque[bytes] = deque()
        self._is_torn = False  # the file ends within a line
        self._fails = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Have a line written soon; it comes with its end. It is dropped if too many are waiting."""
        if len(self._lines) < LINES_MAX:
            self._lines.append(line)
        else:
            self.dropped += 1

    async def close(self) -> None:
        """Write what is waiting, for CLOSE_SECONDS_MAX at most."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join, CLOSE_SECONDS_MAX)

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            self._flush()
        self._flush()
        os.close(self._descriptor)

    def _flush(self) -> None:
        """Write all lines that are waiting. What cannot be written is dropped: the disk may be full for long."""
        count = len(self._lines)
        if not count:
            return
        data = b"".join([self._lines.popleft() for _ in range(count)])
        try:
            self._follow()
            unwritten = self._write(data)
        except OSError as error:
            self._complain(error.strerror or str(error))
            self.dropped += count
            return
        self.dropped += unwritten
        self.written += count - unwritten
        if self._fails and not unwritten:
            self._fails = False
            _logger.warning("the request log %s is written again; %d lines were dropped so far", self._path, self.dropped)

    def _write(self, data: bytes) -> int:
        """Return how many lines were not written, or not to their ends. Raises OSError if none was."""
        left = b"\n" + data if self._is_torn else data
        while left:
            try:
                done = self._write_bytes(self._descriptor, left)
            except OSError as error:
                if len(left) >= len(data):
                    raise
                self._complain(error.strerror or str(error))
                return left.count(b"\n")
            self._is_torn = not left[:done].endswith(b"\n")
            left = left[done:]
        return 0

    def _follow(self) -> None:
        """Open the file anew if another one, or none, has its name. Raises OSError."""
        if self._path == STDOUT:
            return
        mine = os.fstat(self._descriptor)
        try:
            named = os.stat(self._path)
            if (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino):
                return
        except FileNotFoundError:
            pass
        fresh = _opened(self._path)
        os.close(self._descriptor)
        self._descriptor, self._is_torn = fresh, False

    def _complain(self, why: str) -> None:
        """Once, until it works again."""
        if not self._fails:
            self._fails = True
            _logger.warning("cannot write the request log %s: %s; lines are dropped until it can be written", self._path, why)


def _opened(path: str) -> int:
    """A descriptor that appends to the file, which is made if it is missing, for this user alone. Raises OSError."""
    descriptor = os.open(path, _FLAGS, 0o600)
    os.set_blocking(descriptor, True)
    return descriptor
