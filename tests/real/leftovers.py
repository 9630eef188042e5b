"""What a fleet may leave behind: processes that carry its mark, files in shared memory that nobody uses."""

import contextlib
import os
from pathlib import Path

SHM = Path("/dev/shm")


def marked_processes(name: str, value: str) -> list[int]:
    """Processes, zombies left out, whose environment has `name=value`."""
    wanted = f"{name}={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # it ended, is a zombie, or is another user's
                continue
    return found


def shared_files() -> frozenset[Path]:
    """Every file in /dev/shm. Directories there are somebody's own; a fleet's table_dir is looked at by itself."""
    return frozenset(path for path in SHM.iterdir() if not path.is_dir())


def leaked_files(before: frozenset[Path]) -> list[str]:
    """Files in /dev/shm that are not in `before` and that no living process has open or mapped."""
    fresh = {}
    for path in shared_files() - before:
        with contextlib.suppress(FileNotFoundError):
            fresh[path.stat().st_ino] = str(path)
    for inode in _used_inodes() if fresh else ():
        fresh.pop(inode, None)
    return sorted(fresh.values())


def remove_files(inodes: set[int]) -> None:
    """Remove these from /dev/shm, but for those that a living process has open or mapped."""
    unused = inodes - _used_inodes()
    for path in shared_files():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino in unused:
                path.unlink()


def inodes_of(process: Path) -> set[int]:
    """Of files in /dev/shm that a process, by its directory in /proc, has open or mapped.

    Not their names: a semaphore is mapped under that of its first file.
    """
    used: set[int] = set()
    with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
        mapped = [line.split(maxsplit=5) for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line]
        used |= {int(fields[4]) for fields in mapped}
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(link).startswith("/dev/shm/"):
                    used.add(link.stat().st_ino)
    return used


def _used_inodes() -> set[int]:
    return set().union(*(inodes_of(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()))
