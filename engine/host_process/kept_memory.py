"""Memory that the replica host keeps for the replicas' host-memory tiers: it outlives them, and ends with the host.

It has no name: replicas open it as /proc/<pid>/fd/<fd>, so nothing is left behind however the host ends. Pages are taken from
the system when something is stored in them. With a directory it is in named files there instead (named_memory.py).
"""

import os
from pathlib import Path

import msgspec

from engine.host_process.named_memory import open_named_memory
from transport.backends.shared_memory import region_of
from transport.table import liveness
from transport.table.layout import Region
from transport.table.tiers import host_memory_of

VARIABLE = "PEERKV_KEPT_MEMORY"
"""The variable in a replica's environment that tells it what is kept for it."""


class KeptMemory(msgspec.Struct, frozen=True):
    """What process `pid` keeps for a replica: memory, and an empty file that it has locked, from which the table is made.

    Named memory is no process's, so `pid` is 0; its table gets a second name, that of a file from which a later host has it.
    `new`: no other process ever was told of this memory, so none can have anything in it on offer.
    """

    pid: int
    region: Region
    draft: str
    second_name: str = ""
    new: bool = False


class KeptMemories:
    """Belongs to the host's thread. `table_dir` is where the tables are made."""

    def __init__(self, table_dir: Path) -> None:
        self._table_dir = table_dir
        self._memory: dict[str, tuple[tuple[int, ...], Region, str]] = {}
        self._locks: dict[str, list[int]] = {}
        self._drafts = 0

    def keep(self, name: str, size: int, directory: Path | None = None) -> KeptMemory:
        """Return what is kept for the replica `name`: the memory of its first start, `size` bytes, in files of `directory` if
        one is given. Raises OSError."""
        new = name not in self._memory
        if new:
            self._memory[name] = self._open(name, size, directory)
        self._release(name)
        self._drafts += 1
        draft = self._table_dir / f".{host_memory_of(name)}.{os.getpid()}.{self._drafts}"
        lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        liveness.claim(lock)
        self._locks.setdefault(name, []).append(lock)
        _, region, second_name = self._memory[name]
        pid = 0 if second_name else os.getpid()
        return KeptMemory(pid, region, str(draft), second_name, new=new and not second_name)  # named memory may be from before

    def _open(self, name: str, size: int, directory: Path | None) -> tuple[tuple[int, ...], Region, str]:
        if directory is None:
            fd = os.memfd_create(f"peerkv-{name}", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            return (fd,), region_of(fd, size), ""
        named = open_named_memory(directory, name, size, self._table_dir)
        if named.table >= 0:
            self._locks.setdefault(name, []).append(named.table)
        return named.descriptors, named.region, str(named.second_name)

    def descriptors(self) -> tuple[int, ...]:
        """Return all that is open here: a forked replica must close them, or the tables would outlive the host."""
        memory = (fd for fds, _, _ in self._memory.values() for fd in fds)
        return (*memory, *(lock for locks in self._locks.values() for lock in locks))

    def _release(self, name: str) -> None:
        """Let go of the files that are gone, and remove the drafts that no replica made a table of."""
        kept = []
        for lock in self._locks.get(name, []):
            found = os.fstat(lock)
            if found.st_nlink and found.st_size:
                kept.append(lock)
                continue
            if found.st_nlink:
                Path(os.readlink(f"/proc/self/fd/{lock}")).unlink(missing_ok=True)
            os.close(lock)
        self._locks[name] = kept


def encode_kept(kept: KeptMemory) -> str:
    """Return the value of VARIABLE."""
    return msgspec.json.encode(kept).decode()


def decode_kept(value: str) -> KeptMemory:
    """The inverse of `encode_kept`. Raises msgspec.MsgspecError."""
    return msgspec.json.decode(value, type=KeptMemory)
