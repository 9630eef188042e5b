"""What disk, vault and host memory hold, for people: by model, copied to a file and back. A file of frames is a segment like a
disk's. Host memory is read by the table protocol, as the way down reads it; only its replicas change it.

A disk is read as it lies, also while another process writes it; what changes it needs its lock.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.frame_tiers.demotion import Demotion
from engine.frame_tiers.disk.segment import SUFFIX, Found, create, scan
from engine.frame_tiers.models import Models
from engine.frame_tiers.secrecy import OPEN, Secrecy
from engine.frame_tiers.store import FrameId, FrameStore, StoreRefused, frame_id
from engine.frame_tiers.vault.vault_store import VaultStore
from transport.frames.errors import FrameError
from transport.frames.frame import read_header
from transport.table.reader import SUFFIX as TABLE_SUFFIX
from transport.table.tiers import HOST_MEMORY

TOGETHER_BYTES = 8 << 20
FETCH_SECONDS_MAX = 60.0
MODEL_BYTES = 16
"""The beginning of an id: the fingerprint of the frames of one rank of one model."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A frame that is there."""

    id: FrameId
    bytes: int
    created_ns: int = 0
    """When its segment was begun, since 1970; 0 where that is not known."""

    @property
    def model(self) -> str:
        """Whose it is: 32 hex digits, of one rank of one model."""
        return self.id[:MODEL_BYTES].hex()


@dataclass(slots=True)
class Moved:
    """What was copied, and what was not as it does not match its checksum."""

    frames: int = 0
    bytes: int = 0
    damaged: int = 0


def on_disk(directory: Path) -> Iterator[Kept]:
    """Yield every frame on a disk. Raises StoreRefused if the directory cannot be read."""
    for segment, frames in _segments(directory):
        for each in frames:
            yield Kept(each.id, each.size, segment)


def in_vault(store: VaultStore) -> Iterator[Kept]:
    """Yield every frame in a vault. Raises StoreRefused if it does not answer."""
    for each, size in store.each():
        yield Kept(each, size)


def frames_on_disk(directory: Path, wanted: Callable[[FrameId], bool]) -> Iterator[bytes]:
    """Yield frames on a disk, unchecked. Raises StoreRefused."""
    for path in _paths(directory):
        try:
            found = scan(path)
            if found is None:
                continue
            with path.open("rb") as file:
                for each in found[1]:
                    if wanted(each.id):
                        file.seek(each.offset)
                        yield file.read(each.size)
        except FileNotFoundError:  # it gave way meanwhile
            continue
        except OSError as error:
            raise StoreRefused(f"{path}: {error.strerror}") from error


def frames_in_vault(store: VaultStore, wanted: Callable[[FrameId], bool]) -> Iterator[bytes]:
    """Yield frames in a vault, unchecked. Raises StoreRefused."""
    batch: list[FrameId] = []
    size = 0
    for kept in in_vault(store):
        if wanted(kept.id):
            batch.append(kept.id)
            size += kept.bytes
        if size >= TOGETHER_BYTES:
            yield from _fetched(store, batch)
            batch, size = [], 0
    yield from _fetched(store, batch)


def in_host_memory(table_dir: Path, secrecy: Secrecy = OPEN) -> Iterator[Kept]:
    """Yield every block that the replicas with tables in a directory keep in host memory, one a rank. Raises StoreRefused."""
    with _reading(table_dir, secrecy) as found:
        for ids, size, _ in found.on_offer():
            yield from (Kept(each, size) for each in ids)


def frames_in_host_memory(table_dir: Path, wanted: Callable[[FrameId], bool], secrecy: Secrecy = OPEN) -> Iterator[bytes]:
    """Yield what is in host memory as frames, encrypted by a secret. Raises StoreRefused."""
    with _reading(table_dir, secrecy) as found:
        for ids, _, frames in found.on_offer():
            if any(map(wanted, ids)):
                yield from (frame for frame in frames() if wanted(frame_id(frame)))


@contextmanager
def _reading(table_dir: Path, secrecy: Secrecy) -> Iterator[Demotion]:
    if not any(table_dir.glob("*" + HOST_MEMORY + TABLE_SUFFIX)):
        raise StoreRefused(f"no replica has host memory in {table_dir}: give the directory of the block tables (--table-dir)")
    found = Demotion(table_dir, Models(secrecy), tuple)
    try:
        yield found
    finally:
        found.close()


def write_file(path: Path, frames: Iterable[bytes]) -> Moved:
    """Write the frames that are whole to a new file. Raises OSError, FileExistsError."""
    moved = Moved()
    _, fd = create(path, time.time_ns())
    with os.fdopen(fd, "ab") as file:
        for frame in frames:
            if not _whole(frame):
                moved.damaged += 1
                continue
            file.write(frame)
            moved.frames += 1
            moved.bytes += len(frame)
    return moved


def read_file(path: Path, store: FrameStore) -> Moved:
    """Put the frames of a file that are whole into a store. Raises StoreRefused if it is no such file."""
    found = scan(path)
    if found is None:
        raise StoreRefused(f"{path} is no file of KV blocks: `peerkv kv export` writes them")
    moved = Moved()
    batch: list[tuple[FrameId, bytes]] = []
    size = 0
    with path.open("rb") as file:
        for each in found[1]:
            file.seek(each.offset)
            frame = file.read(each.size)
            if not _whole(frame):
                moved.damaged += 1
                continue
            batch.append((each.id, frame))
            size += each.size
            if size >= TOGETHER_BYTES:
                store.put(batch)
                batch, size = [], 0
            moved.frames += 1
            moved.bytes += each.size
    store.put(batch)
    return moved


def remove(store: FrameStore, kept: Iterable[Kept], wanted: Callable[[FrameId], bool]) -> Moved:
    """Remove frames from a store."""
    moved = Moved()
    going = [each for each in kept if wanted(each.id)]
    for first in range(0, len(going), 1000):
        store.remove([each.id for each in going[first : first + 1000]])
    moved.frames, moved.bytes = len(going), sum(each.bytes for each in going)
    return moved


def _segments(directory: Path) -> Iterator[tuple[int, list[Found]]]:
    for path in _paths(directory):
        try:
            found = scan(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StoreRefused(f"{path}: {error.strerror}") from error
        if found is not None:
            yield found[0].created_ns, found[1]


def _paths(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise StoreRefused(f"{directory} is no directory")
    return sorted(directory.glob("*" + SUFFIX))


def _fetched(store: VaultStore, ids: list[FrameId]) -> list[bytes]:
    found: dict[int, bytes] = {}

    def take(place: int, frame: memoryview) -> bool:
        found[place] = bytes(frame)
        return True

    if ids:
        store.fetch(ids, take, time.monotonic() + FETCH_SECONDS_MAX)
    return [found[place] for place in sorted(found)]


def _whole(frame: bytes) -> bool:
    try:
        read_header(frame)
    except FrameError:
        return False
    return True
