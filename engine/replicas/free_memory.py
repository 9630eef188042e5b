"""How much memory this process may still take: the machine's, or what its control groups leave of theirs if that is less."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")


class _Version(NamedTuple):
    """Where a version of control groups says how much memory a group may take, and how much it has taken."""

    mount: str
    own: str
    """What finds the path of this process's group in OWN_GROUPS."""
    limits: tuple[str, ...]
    used: str
    cached: str
    """The line of memory.stat that tells what of it is page cache, in bytes."""


_VERSIONS = (
    _Version(".", r"^0::/(.*)$", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    _Version(
        "memory",
        r"^\d+:(?:[^:\n]*,)?memory(?:,[^:\n]*)?:/(.*)$",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def free_bytes(meminfo: Path = MEMINFO, own_groups: Path = OWN_GROUPS, cgroup: Path = CGROUP) -> int:
    """Return how much memory this process may still take, in bytes: the machine's, or what a control group leaves of its own.

    The groups are its own and all above that can be seen. What a group's files take of the page cache counts as free, as it
    does for the machine: reading weights fills it.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    free = int(found[1]) << 10 if found else 0
    own = _text(own_groups)
    return min([free, *(left for version in _VERSIONS for left in _left(version, own, cgroup / version.mount))])


def _left(version: _Version, own: str, mount: Path) -> Iterator[int]:
    """What each group with a limit leaves. In a container the mount itself may be the group, and the path lead nowhere."""
    found = re.search(version.own, own, re.MULTILINE)
    group = mount / found[1] if found else mount
    for each in (group, *(above for above in group.parents if above.is_relative_to(mount))):
        limits = [_number(_text(each / name)) for name in version.limits]
        if given := [limit for limit in limits if limit is not None]:
            cached = re.search(rf"^{version.cached} (\d+)$", _text(each / "memory.stat"), re.MULTILINE)
            used = (_number(_text(each / version.used)) or 0) - (int(cached[1]) if cached else 0)
            yield max(0, min(given) - max(0, used))


def _text(path: Path) -> str:
    """What the file says; "" if it cannot be read: there may be no such group, or no limits in it."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None  # "max" is none
