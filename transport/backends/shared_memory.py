"""KV memory of CPU replicas: the engine's own tensors, moved into shared memory in place and read one-sided by the importer.

The memory has no name in /dev/shm: peers open it as /proc/<pid>/fd/<fd>, so nothing is left behind however its owner ends. They
need the same user and the same PID namespace.
"""

import ctypes
import mmap
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt

from transport.backends.base import ImportJob, ImportResult
from transport.backends.geometry import layer_geometries
from transport.backends.verification import check
from transport.errors import MemoryUnreachable
from transport.table.layout import Layer, Memory, Region
from transport.table.reader import TableReader

SLICE_SECONDS = 0.010
"""How long one `poll` may copy: longer would hold up the requests that are being decoded beside the import."""
PIECE_BYTES_MAX = 4 << 20


class _Handle(msgspec.Struct, frozen=True):
    pid: int
    fd: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class _Peer:
    """An owner's mapped memory: for each layer the address of block 0 and the stride."""

    layers: tuple[tuple[int, int], ...]
    maps: tuple[mmap.mmap, ...]


@dataclass(slots=True)
class _Copy:
    job: ImportJob
    reader: TableReader
    pieces: Iterator[tuple[int, int, int]]
    bytes: int
    began_ns: int


class SharedMemoryTransport:
    """Moves the storages of `kv_caches` (torch CPU tensors, by layer name) into shared memory and imports by memcpy.

    Raises MemoryUnreachable for a layout it cannot serve and OSError if shared memory is short.
    """

    name: ClassVar[str] = "shared_memory"

    def __init__(
        self, kv_caches: Mapping[str, Any], num_blocks: int, rank: int = 0, groups: Mapping[str, int] | None = None
    ) -> None:
        geometries = layer_geometries(kv_caches, num_blocks, groups)
        storages = {g.storage._cdata: g.storage for g in geometries}  # several layers may share one allocation
        places = {key: place for place, key in enumerate(storages)}
        regions = tuple(_share(storage) for storage in storages.values())
        self._layers = tuple((g.storage.data_ptr() + g.offset, g.stride) for g in geometries)
        layers = tuple(Layer(places[g.storage._cdata], g.offset, g.stride, g.bytes, g.group) for g in geometries)
        self._memory = Memory(rank, self.name, regions, layers)
        self._rank = rank
        self._storages = tuple(storages.values())  # the addresses above live as long as these
        self._peers: dict[tuple[str, int], _Peer] = {}
        self._copies: deque[_Copy] = deque()

    def memory(self) -> Memory:
        return self._memory

    def prepare(self, reader: TableReader) -> None:
        """Nothing is gained ahead: memory is mapped in microseconds."""

    def start(self, job: ImportJob, reader: TableReader, *, gently: bool) -> None:
        peer = self._peers.get((job.source, job.epoch))
        if peer is None:
            peer = self._peers[job.source, job.epoch] = self._map(reader)
        parts, layers = job.groups(), self._memory.layers
        size = sum(layer.bytes * (parts[layer.group].stop - parts[layer.group].start) for layer in layers)
        runs = [_runs(job.source_blocks[part], job.target_blocks[part]) for part in parts]
        pieces = _pieces(runs, layers, peer.layers, self._layers)
        self._copies.append(_Copy(job, reader, pieces, size, time.monotonic_ns()))

    def poll(self) -> list[ImportResult]:
        results: list[ImportResult] = []
        deadline = time.monotonic() + SLICE_SECONDS
        while self._copies:
            copy = self._copies[0]
            for target, source, size in copy.pieces:
                ctypes.memmove(target, source, size)
                if time.monotonic() > deadline:
                    return results
            self._copies.popleft()
            failed, stale, reason = check(copy.job, copy.reader)
            took = time.monotonic_ns() - copy.began_ns
            results.append(ImportResult(copy.job, failed, stale, copy.bytes, took, reason))
        return results

    def pending(self) -> int:
        return len(self._copies)

    def retain(self, live: set[tuple[str, int]]) -> None:
        kept = live | {(copy.job.source, copy.job.epoch) for copy in self._copies}
        for owner in [owner for owner in self._peers if owner not in kept]:
            del self._peers[owner]

    def close(self) -> None:
        self._copies.clear()
        self._peers.clear()

    def _map(self, reader: TableReader) -> _Peer:
        memory = next((m for m in reader.memories if m.rank == self._rank and m.transport == self.name), None)
        if memory is None:
            raise MemoryUnreachable(f"{reader.name} offers no shared memory for rank {self._rank}")
        if [(layer.group, layer.bytes) for layer in memory.layers] != [(own.group, own.bytes) for own in self._memory.layers]:
            raise MemoryUnreachable(f"{reader.name} has layers of other sizes")
        maps = tuple(_map_region(region) for region in memory.regions)
        layers = []
        for layer in memory.layers:
            if not 0 <= layer.region < len(maps) or layer.offset < 0 or layer.stride < layer.bytes:
                raise MemoryUnreachable(f"{reader.name} describes a layer that does not fit its memory")
            region = maps[layer.region]
            if layer.offset + (reader.num_blocks - 1) * layer.stride + layer.bytes > len(region):
                raise MemoryUnreachable(f"{reader.name} describes a layer that ends beyond its memory")
            base = int(np.frombuffer(region, np.uint8).__array_interface__["data"][0])
            layers.append((base + layer.offset, layer.stride))
        return _Peer(tuple(layers), maps)


def _share(storage: Any) -> Region:
    """Move a torch storage into shared memory, in place, and return how others open it."""
    storage.share_memory_()
    fd, size = storage._share_fd_cpu_()
    found = os.fstat(fd)
    return Region(msgspec.json.encode(_Handle(os.getpid(), fd, found.st_dev, found.st_ino)).decode(), size)


def _map_region(region: Region) -> mmap.mmap:
    try:
        handle = msgspec.json.decode(region.handle, type=_Handle)
        fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except (msgspec.MsgspecError, OSError) as error:
        raise MemoryUnreachable(f"shared memory of another replica: {error}; share the PID namespace and the user") from error
    try:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (handle.device, handle.inode) or not 0 < region.size <= found.st_size:
            raise MemoryUnreachable(f"process {handle.pid} no longer holds the memory that its table names")
        return mmap.mmap(fd, region.size, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _runs(source: npt.NDArray[np.int32], target: npt.NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """Join neighbours: (first source block, first target block, blocks) for stretches consecutive on both sides."""
    if not len(source):
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(source)])))
    return list(zip(source[starts].tolist(), target[starts].tolist(), lengths.tolist(), strict=True))


def _pieces(
    runs: list[list[tuple[int, int, int]]],
    layers: tuple[Layer, ...],
    sources: tuple[tuple[int, int], ...],
    targets: tuple[tuple[int, int], ...],
) -> Iterator[tuple[int, int, int]]:
    """Yield (target address, source address, bytes), at most about PIECE_BYTES_MAX each; `runs` are those of each group."""
    for layer, (source, source_stride), (target, target_stride) in zip(layers, sources, targets, strict=True):
        size = layer.bytes
        dense = source_stride == target_stride == size
        step = max(1, PIECE_BYTES_MAX // size) if dense else 1
        for first_source, first_target, blocks in runs[layer.group]:
            for at in range(0, blocks, step):
                count = min(step, blocks - at)
                yield (
                    target + (first_target + at) * target_stride,
                    source + (first_source + at) * source_stride,
                    count * size,
                )
