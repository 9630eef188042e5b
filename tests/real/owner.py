"""Block tables of the tests' own in a fleet's directory: what they say is wrong, or changes while others read.

`python -m tests.real.owner` is an owner in a process of its own that is dead before anybody who begins to import can copy.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import select
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from transport.fingerprint import fingerprint_digest
from transport.keys import Keys, chain_keys, root_key
from transport.table.layout import Description, Layer, Memory, Region
from transport.table.reader import SUFFIX, Run, TableReader
from transport.table.writer import TableWriter

Bytes = npt.NDArray[np.uint8]
_IN_OPEN = 0x20
_SCRAMBLE_SEED = 7


def keys_of(like: TableReader, ids: list[int], salt: str, fields: Mapping[str, str] | None = None) -> Keys:
    """Keys of the full blocks of `ids`, as the owner of `like` makes them, or as one with other fingerprint `fields` would."""
    fingerprint = like.fingerprint if fields is None else fingerprint_digest(fields)
    return chain_keys(root_key(fingerprint, salt, "", like.hash_name), ids, like.block_size, like.hash_name)


def held(like: TableReader, ids: list[int], salt: str) -> Run:
    """The leading blocks of `ids` that the owner of `like` holds; all full ones, or the test is not what it says."""
    run = like.longest_run(keys_of(like, ids, salt))
    assert len(run) == len(ids) // like.block_size
    return run


@contextlib.contextmanager
def table_like(
    table_dir: Path, name: str, like: TableReader, *, blocks: int | None = None, **changes: Any
) -> Iterator[TableWriter]:
    """A table that says of itself what `like` does, but for its name and `changes` (fields of Description)."""
    said = like.description
    about = {field: getattr(said, field) for field in said.__struct_fields__} | {"replica": name, "pid": os.getpid()}
    table = TableWriter(table_dir, Description(**about | changes), like.block_size, blocks or like.num_blocks)
    try:
        yield table
    finally:
        table.close()


class OwnMemory:
    """Memory in the layout of another owner's, with a copy of some of its blocks, which are 0, 1, 2 … here."""

    def __init__(self, like: TableReader, run: Run) -> None:
        (theirs,) = like.memories
        self.blocks = len(run)
        sizes = [layer.bytes for layer in theirs.layers]
        starts = np.cumsum([0, *(size * self.blocks for size in sizes)]).tolist()
        self._file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115  closed with the memory
        self.fd = self._file.fileno()
        os.ftruncate(self.fd, starts[-1])
        found = os.fstat(self.fd)
        self._map = mmap.mmap(self.fd, starts[-1])
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        handle = {"pid": os.getpid(), "fd": self.fd, "device": found.st_dev, "inode": found.st_ino}
        layers = tuple(Layer(0, start, size, size) for start, size in zip(starts[:-1], sizes, strict=True))
        self.memory = Memory(theirs.rank, theirs.transport, (Region(json.dumps(handle), starts[-1]),), layers)
        with _opened(theirs) as regions:
            for layer, start in zip(theirs.layers, starts[:-1], strict=True):
                for place, block in enumerate(run.block_ids.tolist()):
                    at = layer.offset + block * layer.stride
                    to = start + place * layer.bytes
                    self._bytes[to : to + layer.bytes] = regions[layer.region][at : at + layer.bytes]

    def scramble(self) -> None:
        """Overwrite every block with small numbers that mean nothing."""
        noise = np.random.default_rng(_SCRAMBLE_SEED).normal(size=1 << 16).astype(np.float32).view(np.uint8)
        for start in range(0, len(self._bytes), len(noise)):
            part = self._bytes[start : start + len(noise)]
            part[:] = noise[: len(part)]

    def content(self) -> Bytes:
        """A copy of all blocks."""
        return self._bytes.copy()

    def restore(self, content: Bytes) -> None:
        """Put back what `content` returned."""
        self._bytes[:] = content

    def watch(self) -> int:
        """A descriptor that becomes readable when somebody opens this memory: an import begins."""
        return watch_opens(f"/proc/self/fd/{self.fd}")

    def die_when_opened(self) -> None:
        """Have this process killed when somebody opens the memory: a lease makes the opening wait until we are dead."""
        signal.signal(signal.SIGIO, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)

    def close(self) -> None:
        """Let go of the memory."""
        self._file.close()


def wait_readable(fds: list[int], seconds: float | None = None) -> list[int]:
    """Those of `fds` that are readable, as soon as one is; none after `seconds`. Unlike select it takes any descriptor."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return [fd for fd, _ in poll.poll(None if seconds is None else seconds * 1000)]


def watch_opens(path: str) -> int:
    """A descriptor that becomes readable when somebody opens the file at `path`."""
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if inotify < 0 or libc.inotify_add_watch(inotify, path.encode(), _IN_OPEN) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    return int(inotify)


@contextlib.contextmanager
def _opened(memory: Memory) -> Iterator[list[Bytes]]:
    maps = []
    for region in memory.regions:
        handle = msgspec.json.decode(region.handle)
        with open(f"/proc/{handle['pid']}/fd/{handle['fd']}", "rb") as file:
            maps.append(mmap.mmap(file.fileno(), region.size, prot=mmap.PROT_READ))
    yield [np.frombuffer(mapped, np.uint8) for mapped in maps]


def main() -> None:
    """Offer the blocks that `--like` holds of the ids on stdin, until stdin ends or somebody opens our memory."""
    options = argparse.ArgumentParser()
    options.add_argument("--table-dir", type=Path, required=True)
    options.add_argument("--name", required=True)
    options.add_argument("--like", required=True)
    asked = options.parse_args()
    given = json.loads(sys.stdin.readline())
    like = TableReader(asked.table_dir / (asked.like + SUFFIX))
    run = held(like, given["ids"], given["salt"])
    memory = OwnMemory(like, run)
    memory.die_when_opened()
    with table_like(asked.table_dir, asked.name, like, blocks=memory.blocks, memories=(memory.memory,)) as table:
        table.publish(range(memory.blocks), keys_of(like, given["ids"], given["salt"]))
        print("ready", flush=True)
        wait_readable([sys.stdin.fileno()])


if __name__ == "__main__":
    main()
