"""A disk's directory: one process at a time writes it, and whole pieces go into its files."""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from engine.frame_tiers.store import StoreRefused

LOCK_FILE = "lock"


def write_all(writev: Callable[[int, list[bytes]], int], fd: int, pieces: list[bytes]) -> None:
    """Append all bytes to a file. Raises OSError, ENOSPC also where nothing more is taken."""
    while pieces:
        done = writev(fd, pieces)
        if done <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while pieces and done >= len(pieces[0]):
            done -= len(pieces.pop(0))
        if done:
            pieces[0] = pieces[0][done:]


def claim(directory: Path, wait_seconds: float) -> int:
    """Make the directory, mode 0700, and return a descriptor that locks it. Raises StoreRefused."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreRefused(f"{directory} cannot be used: {error.strerror}") from error
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise StoreRefused(f"{directory} is in use by another peerkv: give each a directory of its own") from None
        except OSError as error:
            os.close(fd)
            raise StoreRefused(f"{directory} cannot be locked: {error.strerror}") from error
        time.sleep(0.05)
