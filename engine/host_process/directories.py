"""Directories that one running peerkv owns exclusively: claimed, locked, and removed with their contents.

Sockets and `fleet.json` are in `$XDG_RUNTIME_DIR/peerkv/<port>` or `/tmp/peerkv-<uid>/<port>`, block tables in
`/dev/shm/peerkv-<uid>/<port>`; both are emptied when a supervisor starts there. Logs, which stay, are in
`~/.local/state/peerkv/logs/<port>`. In containers gateway and engines share the first two by one volume in memory.

A claimed directory carries a marker file under an exclusive lock. The replica host shares the lock
by inheriting the descriptor, so that nobody takes the directory over before the last of the two has cleaned up.
"""

import asyncio
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.fleet import FleetError

MARKER = ".peerkv-owned"
CLAIM_POLL_SECONDS = 0.05


class DirectoryRefused(FleetError):
    """The directory cannot be used as requested; the message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A directory that is ours as long as `lock_fd` is open, here or in a process that inherited it."""

    path: Path
    lock_fd: int


def claim(path: Path, wait_seconds: float) -> Claim:
    """Make `path` (mode 0700) ours and empty.

    Waits at most `wait_seconds` (blocking) for a previous owner to release it. Raises DirectoryRefused if it does
    not, if the directory belongs to another user, or if it holds files that peerkv did not put there.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DirectoryRefused(f"cannot use {path}: {error.strerror}: choose another") from error
    deadline = time.monotonic() + wait_seconds
    while True:
        _make_private(path)
        lock_fd = _try_lock(path)
        if lock_fd is not None:
            _empty(path)
            return Claim(path, lock_fd)
        if time.monotonic() >= deadline:
            raise _in_use(path)
        time.sleep(CLAIM_POLL_SECONDS)


async def wait_until_free(paths: Iterable[Path], wait_seconds: float, say: Callable[[str], None]) -> None:
    """Return once no other peerkv owns any of `paths`, which are left as they are; `say` is told of one that is owned.

    Waits at most `wait_seconds`, as that one may be about to end. Raises DirectoryRefused.
    """
    deadline = time.monotonic() + wait_seconds
    for path in paths:
        said = False
        while _is_locked(path):
            if time.monotonic() >= deadline:
                raise _in_use(path)
            if not said:
                say(f"{path} is in use by another running peerkv: waiting up to {wait_seconds:g} s for it to end")
                said = True
            await asyncio.sleep(CLAIM_POLL_SECONDS)  # not in a thread: who is told to stop stops at once


def claim_all(paths: Iterable[Path], wait_seconds: float) -> tuple[Claim, ...]:
    """Claim every one of `paths`, or none. Raises DirectoryRefused."""
    claims: list[Claim] = []
    try:
        for path in paths:
            claims += [claim(path, wait_seconds)]
    except DirectoryRefused:
        release(claims)
        raise
    return tuple(claims)


def release(claims: Iterable[Claim]) -> None:
    """Remove claimed directories with their contents, and release them."""
    for held in claims:
        remove_claimed(held.path)
        os.close(held.lock_fd)


def remove_claimed(path: Path) -> bool:
    """Remove `path` and everything in it if it is our directory with our marker. Returns whether it did.

    The caller holds the lock. Anything else is left as it is.
    """
    try:
        status = os.lstat(path)
        os.lstat(path / MARKER)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return False
    _empty(path)
    (path / MARKER).unlink(missing_ok=True)
    try:
        path.rmdir()
    except OSError:  # somebody put a file there just now: theirs to remove
        return False
    return True


def _in_use(path: Path) -> DirectoryRefused:
    return DirectoryRefused(f"{path} is in use by another running peerkv: stop it, or choose another run_dir or port")


def _is_locked(path: Path) -> bool:
    """Whether somebody holds the marker's lock. What is wrong otherwise, `claim` says."""
    try:
        fd = os.open(path / MARKER, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(path)
        above = os.stat(path.parent)
    except OSError as error:
        raise DirectoryRefused(f"cannot use {path}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise DirectoryRefused(f"{path} is not a directory of user {os.getuid()}: remove it or choose another")
    if above.st_uid not in (0, os.getuid()) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        raise DirectoryRefused(f"{path.parent} can be changed by other users: choose a directory of your own")
    entries = set(os.listdir(path))
    if entries and MARKER not in entries:
        raise DirectoryRefused(
            f"{path} holds files that are not peerkv's, and peerkv removes the directory when it ends: choose an empty one"
        )
    path.chmod(0o700)


def _try_lock(path: Path) -> int | None:
    """The descriptor of the locked marker, or None when another holds it or removed it meanwhile. Raises DirectoryRefused."""
    try:
        lock_fd = os.open(path / MARKER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    locked = False
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = os.fstat(lock_fd).st_ino == os.lstat(path / MARKER).st_ino
    except (BlockingIOError, FileNotFoundError):
        return None
    except OSError as error:  # as on a file system without locks
        raise DirectoryRefused(f"{path} cannot be locked: {error.strerror}: choose another") from error
    finally:
        if not locked:
            os.close(lock_fd)
    return lock_fd if locked else None


def _empty(path: Path) -> None:
    for entry in os.scandir(path):
        if entry.name == MARKER:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)
