"""What a fleet may leave behind: processes that carry its mark, files in shared memory that nobody uses."""

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
    fresh = {str(path) for path in shared_files() - before}
    return sorted(fresh - _used_files(fresh)) if fresh else []


def _used_files(paths: set[str]) -> set[str]:
    used: set[str] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            for link in (entry / "fd").iterdir():
                used.add(os.readlink(link))
            used |= {line.split(maxsplit=5)[5] for line in (entry / "maps").read_text().splitlines() if "/dev/shm/" in line}
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return used & paths
