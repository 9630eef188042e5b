"""Host memory in named files, so that a restart of everything finds it again: three files for each replica.

`<replica>.memory` is the memory, `<replica>.table` a second name of the block table of what is stored there, and
`<replica>.lock` says who uses them and since which start of the machine. All are on the file system of the block tables,
which is in memory: nothing of them is believed after the machine was started anew.
"""

import asyncio
import errno
import os
import stat
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transport.backends.shared_memory import named_region
from transport.table import liveness
from transport.table.layout import Region
from transport.table.reader import SUFFIX
from transport.table.tiers import host_memory_of

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class NamedMemory:
    """What is open of it here: the lock and the memory by `descriptors`, the table that was found by `table`, -1 without."""

    descriptors: tuple[int, ...]
    table: int
    region: Region
    second_name: Path
    """The name that the table gets beside its own."""


def open_named_memory(directory: Path, name: str, size: int, table_dir: Path) -> NamedMemory:
    """Open the memory of the replica `name`, `size` bytes. If there is a table of what it holds, enter that in `table_dir`.

    Raises OSError, with what to change: the directory is on another file system or somebody else's, its files are in use, or
    memory is short.
    """
    prepare(directory, table_dir)
    opened: list[int] = []
    try:
        lock = _open(directory / f"{name}.lock", opened)
        if not liveness.claim(lock):
            raise _in_use(directory, name)
        memory, second_name = directory / f"{name}.memory", directory / f"{name}.table"
        fd = _open(memory, opened)
        boot = BOOT_ID.read_bytes()
        if os.pread(lock, 4096, 0) != boot or os.fstat(fd).st_size != size:
            second_name.unlink(missing_ok=True)
            os.ftruncate(fd, 0)
            os.ftruncate(lock, 0)
            os.pwrite(lock, boot, 0)
        os.posix_fallocate(fd, 0, size)  # a file system that is full later would end an engine by SIGBUS
        table = _enter(second_name, table_dir / (host_memory_of(name) + SUFFIX))
    except BaseException:
        for each in opened:
            os.close(each)
        raise
    return NamedMemory(tuple(opened), table, named_region(memory, size), second_name)


def prepare(directory: Path, table_dir: Path) -> None:
    """Make the directory if there is none. Raises OSError if it is on another file system than the block tables, or if others
    than this user can enter it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.stat(directory, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            errno.EPERM, "it must be a directory of yours that nobody else can enter (chmod 700)", str(directory)
        )
    there = next(each for each in (table_dir, *table_dir.parents) if each.exists())
    if found.st_dev != os.stat(there).st_dev:
        raise OSError(errno.EXDEV, f"it must be on the file system of the block tables, {table_dir}", str(directory))


async def wait_until_unused(directory: Path, names: Collection[str], wait_seconds: float) -> None:
    """Return once no other process keeps memory of these replicas there; it takes nothing.

    Waits at most `wait_seconds`, as that one may be about to end. Raises BlockingIOError.
    """
    deadline = time.monotonic() + wait_seconds
    while used := [name for name in names if _is_locked(directory / f"{name}.lock")]:
        if time.monotonic() >= deadline:
            raise _in_use(directory, used[0])
        await asyncio.sleep(POLL_SECONDS)


def named_bytes(directory: Path, names: Iterable[str]) -> int:
    """Return how much memory the files of these replicas take already. Those of others stay as they are."""
    found = 0
    for name in names:
        for suffix in (".memory", ".table"):
            with suppress(OSError):
                found += os.lstat(directory / (name + suffix)).st_blocks * 512
    return found


def _in_use(directory: Path, name: str) -> BlockingIOError:
    return BlockingIOError(errno.EBUSY, f"another peerkv keeps host memory of {name} there", str(directory))


def _is_locked(path: Path) -> bool:
    """Whether some process holds the lock. What is wrong otherwise, `open_named_memory` says."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return liveness.claimed(fd)
    except OSError:
        return False
    finally:
        os.close(fd)


def _open(path: Path, opened: list[int]) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    opened.append(fd)
    return fd


def _enter(second_name: Path, path: Path) -> int:
    """Lock the table that was found, and give it its name among the live ones; -1 if there is none."""
    try:
        fd = os.open(second_name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
    try:
        if liveness.claim(fd):
            path.unlink(missing_ok=True)
            os.link(second_name, path)
            return fd
        second_name.unlink()
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return -1
