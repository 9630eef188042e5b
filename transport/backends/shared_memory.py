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
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from transport.backends.base import BlockSource, ImportJob, ImportResult, JobId, Place, outdated, place_of
from transport.backends.coded_blocks import CodedBlocks, put, shape_of
from transport.backends.geometry import layer_geometries
from transport.backends.verification import check
from transport.errors import MemoryUnreachable
from transport.table.layout import CHECKSUM_BYTES, Checksums, Layer, Memory, Region
from transport.table.quality import in_code

SLICE_SECONDS = 0.010
"""How long one `poll` may copy: longer would hold up the requests that are being decoded beside the import."""
PIECE_BYTES_MAX = 4 << 20


class _Handle(msgspec.Struct, frozen=True, omit_defaults=True):
    """Memory behind a descriptor of a process, or, with a `path`, a file, whoever has it open."""

    pid: int
    fd: int
    device: int
    inode: int
    path: str = ""


@dataclass(frozen=True, slots=True)
class _Peer:
    """An owner's mapped memory: for each layer the address of block 0 and the stride."""

    layers: tuple[tuple[int, int], ...]
    maps: tuple[mmap.mmap, ...]
    blocks: "_Checked | None"
    coded: CodedBlocks | None


@dataclass(slots=True)
class _Copy:
    """An import under way. Its `peer` stays mapped for as long."""

    job: ImportJob
    reader: BlockSource
    peer: _Peer
    pieces: Iterator[tuple[int, int, int]]
    bytes: int
    unchecked: Iterator[tuple[int, int, int]]
    coded: Iterator[tuple[int, int]]
    damaged: list[int]
    began_ns: int = 0


@dataclass(frozen=True, slots=True)
class _Checked:
    """Memory with checksums: block b of a group is `sizes[group]` bytes at `start + b * stride` of `memory`."""

    memory: memoryview
    start: int
    checksums: Checksums
    sizes: Mapping[int, int]

    def intact(self, block: int, group: int, key: bytes) -> bool:
        """Tell whether a block is what was stored under its key."""
        begin = self.start + block * self.checksums.stride
        said = self.checksums.offset + block * self.checksums.stride
        return checksum(self.memory[begin : begin + self.sizes[group]], key) == self.memory[said : said + CHECKSUM_BYTES]


def checksum(content: memoryview, key: bytes) -> bytes:
    """Return the checksum of a block's content under its key: a block that is stored under another key does not match."""
    digest = xxhash.xxh3_128(content)
    digest.update(key)
    return digest.digest()


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
        self._peers: dict[Place, _Peer] = {}
        self._copies: deque[_Copy] = deque()

    def memory(self) -> Memory:
        return self._memory

    def layers(self) -> tuple[tuple[int, int], ...]:
        """Return for each of the memory's layers the address of block 0 and the stride; they last as long as this object."""
        return self._layers

    def before_step(self) -> None:
        """What a CPU's engine was to do is done."""

    def prepare(self, reader: BlockSource) -> None:
        """Nothing is gained ahead: memory is mapped in microseconds."""

    def start(self, job: ImportJob, reader: BlockSource, *, gently: bool) -> None:
        place = place_of(reader)
        peer = self._peers.get(place)
        if peer is None:
            peer = self._peers[place] = self._map(reader)
        parts, layers = job.groups(), self._memory.layers
        size = sum(layer.bytes * (parts[layer.group].stop - parts[layer.group].start) for layer in layers)
        coded = in_code(job.states)
        if peer.coded is None and coded.any():
            raise MemoryUnreachable(f"{reader.name} has coded blocks, and does not say how they lie")
        plain = [part.start + np.flatnonzero(~coded[part]) for part in parts]
        runs = [_runs(job.source_blocks[each], job.target_blocks[each]) for each in plain]
        pieces = _pieces(runs, layers, peer.layers, self._layers)
        unchecked: Iterator[tuple[int, int, int]] = iter(())
        if peer.blocks is not None:
            order = np.concatenate(plain)
            groups = [group for group, each in enumerate(plain) for _ in each]
            unchecked = zip(job.source_blocks[order].tolist(), groups, job.target_blocks[order].tolist(), strict=True)
        decoded = zip(job.source_blocks[coded].tolist(), job.target_blocks[coded].tolist(), strict=True)
        self._copies.append(_Copy(job, reader, peer, pieces, size, unchecked, decoded, []))

    def poll(self) -> list[ImportResult]:
        results: list[ImportResult] = []
        deadline = time.monotonic() + SLICE_SECONDS
        while self._copies:
            copy = self._copies[0]
            copy.began_ns = copy.began_ns or time.monotonic_ns()
            for target, source, size in copy.pieces:
                ctypes.memmove(target, source, size)
                if time.monotonic() > deadline:
                    return results
            if not self._compare(copy, deadline) or not self._decode(copy, deadline):
                return results
            self._copies.popleft()
            failed, stale, reason = check(copy.job, copy.reader)
            if more := set(copy.damaged) - set(failed):
                failed, stale = (*failed, *more), stale + len(more)
                reason = reason or f"{len(more)} blocks of {copy.job.source} do not match their checksums"
            took = time.monotonic_ns() - copy.began_ns
            results.append(ImportResult(copy.job, failed, stale, copy.bytes, took, reason))
        return results

    def _compare(self, copy: _Copy, deadline: float) -> bool:
        """Compare checksums of what was copied until `deadline`; whether that is done."""
        blocks = copy.peer.blocks
        for source, group, target in copy.unchecked:
            if blocks is not None and not blocks.intact(source, group, copy.reader.key(source)):
                copy.damaged.append(target)
            if time.monotonic() > deadline:
                return False
        return True

    def _decode(self, copy: _Copy, deadline: float) -> bool:
        """Decode what lies coded until `deadline`; whether that is done."""
        blocks, sizes = copy.peer.coded, [layer.bytes for layer in self._memory.layers]
        if blocks is None:
            return True
        for source, target in copy.coded:
            code, said = blocks.read(source)
            if checksum(code.data, copy.reader.key(source)) == said:
                put(blocks.decoded(code), target, self._layers, sizes)
            else:
                copy.damaged.append(target)
            if time.monotonic() > deadline:
                return False
        return True

    def pending(self) -> int:
        return len(self._copies)

    def checked(self) -> dict[JobId, int]:
        return {}

    def ends_within(self, seconds: float) -> bool:
        return False

    def retain(self, live: set[tuple[str, int]]) -> None:
        for place in outdated(self._peers, live):
            del self._peers[place]

    def close(self) -> None:
        self._copies.clear()
        self._peers.clear()

    def _map(self, reader: BlockSource) -> _Peer:
        memory = next((m for m in reader.memories if m.rank == self._rank and m.transport == self.name), None)
        if memory is None:
            raise MemoryUnreachable(f"{reader.name} offers no shared memory for rank {self._rank}")
        if [(layer.group, layer.bytes) for layer in memory.layers] != [(own.group, own.bytes) for own in self._memory.layers]:
            raise MemoryUnreachable(f"{reader.name} has layers of other sizes")
        maps = tuple(map_region(region) for region in memory.regions)
        layers, whole = [], memory.coded.whole if memory.coded is not None else 1
        for layer in memory.layers:
            if not 0 <= layer.region < len(maps) or layer.offset < 0 or whole * layer.stride < layer.bytes:
                raise MemoryUnreachable(f"{reader.name} describes a layer that does not fit its memory")
            region = maps[layer.region]
            if layer.offset + (reader.num_blocks - 1) * layer.stride + layer.bytes > len(region):
                raise MemoryUnreachable(f"{reader.name} describes a layer that ends beyond its memory")
            base = int(np.frombuffer(region, np.uint8).__array_interface__["data"][0])
            layers.append((base + layer.offset, layer.stride))
        checked = _checked(memory, reader, maps) if memory.checksums is not None else None
        return _Peer(tuple(layers), maps, checked, _coded(memory, reader, maps))


def _share(storage: Any) -> Region:
    """Move a torch storage into shared memory, in place, and return how others open it."""
    storage.share_memory_()
    return region_of(*storage._share_fd_cpu_())


def region_of(fd: int, size: int) -> Region:
    """Return how others open `size` bytes of memory behind `fd`, a descriptor that this process keeps."""
    found = os.fstat(fd)
    return Region(msgspec.json.encode(_Handle(os.getpid(), fd, found.st_dev, found.st_ino)).decode(), size)


def named_region(path: Path, size: int) -> Region:
    """Return how others open the first `size` bytes of a file: the same from every process. Raises OSError."""
    found = os.stat(path, follow_symlinks=False)
    return Region(msgspec.json.encode(_Handle(0, -1, found.st_dev, found.st_ino, str(path))).decode(), size)


def _checked(memory: Memory, reader: BlockSource, maps: tuple[mmap.mmap, ...]) -> _Checked:
    """Return the blocks of memory with checksums. Raises MemoryUnreachable if they do not lie as `Checksums` says."""
    sums = memory.checksums
    assert sums is not None
    start = min(layer.offset for layer in memory.layers)
    sizes: dict[int, int] = {}
    for layer in memory.layers:
        size = sizes.get(layer.group, 0)
        if (layer.region, layer.stride, layer.offset) != (sums.region, sums.stride, start + size):
            raise MemoryUnreachable(f"{reader.name} describes a layer that is not beside the one before")
        sizes[layer.group] = size + layer.bytes
    end = sums.offset + (reader.num_blocks - 1) * sums.stride + CHECKSUM_BYTES
    if sums.offset < 0 or end > len(maps[sums.region]):
        raise MemoryUnreachable(f"{reader.name} describes checksums beyond its memory")
    return _Checked(memoryview(maps[sums.region]), start, sums, sizes)


def _coded(memory: Memory, reader: BlockSource, maps: tuple[mmap.mmap, ...]) -> CodedBlocks | None:
    """Return the blocks that may lie coded, of memory whose layers are all of one group. Raises MemoryUnreachable."""
    coded = memory.coded
    if coded is None:
        return None
    if not 0 <= coded.region < len(maps) or any(layer.group for layer in memory.layers):
        raise MemoryUnreachable(f"{reader.name} describes coded blocks that cannot be")
    return CodedBlocks(
        coded, shape_of(coded, sum(layer.bytes for layer in memory.layers)), maps[coded.region], reader.num_blocks
    )


def map_region(region: Region, *, writable: bool = False) -> mmap.mmap:
    """Map memory that another process keeps. Raises MemoryUnreachable."""
    fd = open_region(region, writable=writable)
    try:
        return mmap.mmap(fd, region.size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
    finally:
        os.close(fd)


def open_region(region: Region, *, writable: bool = False) -> int:
    """Return a descriptor of memory that another process keeps. Raises MemoryUnreachable."""
    try:
        handle = msgspec.json.decode(region.handle, type=_Handle)
        mode = os.O_RDWR if writable else os.O_RDONLY
        if handle.path:
            fd = os.open(handle.path, mode | os.O_CLOEXEC | os.O_NOFOLLOW)
        else:
            fd = os.open(f"/proc/{handle.pid}/fd/{handle.fd}", mode | os.O_CLOEXEC)
    except (msgspec.MsgspecError, OSError) as error:
        raise MemoryUnreachable(f"shared memory of another replica: {error}; share the PID namespace and the user") from error
    found = os.fstat(fd)
    if (found.st_dev, found.st_ino) != (handle.device, handle.inode) or not 0 < region.size <= found.st_size:
        os.close(fd)
        holder = handle.path or f"process {handle.pid}"
        raise MemoryUnreachable(f"{holder} no longer holds the memory that its table names")
    return fd


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
