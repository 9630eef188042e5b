"""All block tables of a directory: the registry of a node."""

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from transport.errors import SHORTAGES, TableError
from transport.table import liveness
from transport.table.reader import SUFFIX, TableReader

_logger = logging.getLogger(__name__)

TABLES_MAX = 1024
LOOKED_AT_MAX = 128
"""Owners that are asked for at once, which costs more than a microsecond each: of a dead one nothing is believed anyway."""


DRAFT_SECONDS_MAX = 60.0
SETTLED_NANOSECONDS = 100_000_000
"""A directory changed this recently may change again without a new modification time: file system clocks tick slowly."""
_DRAFT = re.compile(r"\..+\.\d+\.\d+")  # as TableWriter names it; other hidden files, such as the owner's marker, stay


def sweep(path: Path, now: float) -> int:
    """Remove the tables of owners that are gone, and drafts older than DRAFT_SECONDS_MAX; `now` in seconds since the epoch."""
    removed = 0
    try:
        entries = list(os.scandir(path))
    except FileNotFoundError:
        return 0
    for entry in entries:
        if not entry.is_file(follow_symlinks=False) or not (_DRAFT.fullmatch(entry.name) or entry.name.endswith(SUFFIX)):
            continue
        try:
            if not entry.name.endswith(SUFFIX) and now - entry.stat(follow_symlinks=False).st_mtime <= DRAFT_SECONDS_MAX:
                continue
            fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # a draft that became a table, or another replica that sweeps
            continue
        try:
            if not liveness.claimed(fd):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)
                    removed += 1
        finally:
            os.close(fd)
    return removed


class TableDirectory:
    """The live tables under `path`, re-read when the directory changes. Not thread safe.

    `own` names a replica to leave out: the caller's own. The kernel is asked at most once in `hold_seconds`: that costs more
    than all else about the tables, and an owner may die at any moment after it was looked at anyway.
    """

    def __init__(
        self, path: Path, own: str = "", hold_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._own = own
        self._hold_seconds = hold_seconds
        self._clock = clock
        self._held_until = 0.0
        self._seen: tuple[int, int] | None = None
        self._readers: dict[str, TableReader] = {}
        self._broken: dict[str, int] = {}
        self._turn = 0

    def tables(self, anew: bool = False) -> Mapping[str, TableReader]:
        """Return the readers of all live tables by replica name, with `anew` whatever the kernel was asked lately.

        A dead owner's table is closed and left out.
        """
        if self._hold_seconds:
            now = self._clock()
            if now < self._held_until and not anew:
                return self._readers
            self._held_until = now + self._hold_seconds
        try:
            found = os.stat(self._path)
            seen = (found.st_ino, found.st_mtime_ns)
        except OSError:
            seen = (-1, -1)
        if seen != self._seen:
            if not self._scan():
                return self._readers
            self._seen = seen if time.time_ns() - seen[1] > SETTLED_NANOSECONDS else None
        for name in [name for name, reader in self._looked_at() if not reader.alive()]:
            self._readers.pop(name).close()
        return self._readers

    def _looked_at(self) -> Collection[tuple[str, TableReader]]:
        """Return the readers whose owners are looked at in this call: of very many the next in turn."""
        if len(self._readers) <= LOOKED_AT_MAX:
            return self._readers.items()
        readers = list(self._readers.items())
        begin = self._turn % len(readers)
        self._turn = begin + LOOKED_AT_MAX
        return readers[begin : begin + LOOKED_AT_MAX]

    def _scan(self) -> bool:
        """Scan the directory; False if that has to be repeated for lack of a descriptor or memory."""
        found: dict[str, int] = {}
        try:
            with os.scandir(self._path) as entries:
                for entry in entries:
                    if entry.name.endswith(SUFFIX) and len(found) < TABLES_MAX:
                        found[entry.name.removesuffix(SUFFIX)] = entry.inode()
        except OSError as error:
            if error.errno in SHORTAGES:
                return False
            _logger.debug("no tables under %s: %s", self._path, error)
        found.pop(self._own, None)
        for name in [name for name, reader in self._readers.items() if found.get(name) != reader.inode]:
            self._readers.pop(name).close()
        self._broken = {name: inode for name, inode in self._broken.items() if found.get(name) == inode}
        fresh = [name for name in found if name not in self._readers and self._broken.get(name) != found[name]]
        return all(self._open(name, found[name]) for name in fresh)

    def _open(self, name: str, inode: int) -> bool:
        """Open a table, or note that it is broken; False if neither is known yet."""
        try:
            reader = TableReader(self._path / (name + SUFFIX))
        except TableError as error:
            if getattr(error.__cause__, "errno", None) in SHORTAGES:
                return False
            self._broken[name] = inode
            _logger.warning("%s is left out: %s", name, error)
            return True
        if reader.name != name:
            self._broken[name] = inode
            _logger.warning("%s is left out: its table says that it is %s", name, reader.name)
            reader.close()
            return True
        self._readers[name] = reader
        return True

    def close(self) -> None:
        """Close all readers."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._seen = None
        self._held_until = 0.0
