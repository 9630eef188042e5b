"""KV memory on GPUs of one host: the importer opens the owner's allocations by CUDA IPC and gathers blocks over NVLink or PCIe.

The owner does nothing, and the owner's GPU need not be visible to the importer. An allocation is opened once for an owner's
epoch, in a thread of its own, because it takes milliseconds that the engine's step does not have.
"""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from cuda.bindings import driver, runtime

from transport.backends.base import ImportJob, ImportResult
from transport.backends.gather import WORD_BYTES, gather, plan, segments_of
from transport.backends.geometry import layer_geometries
from transport.backends.verification import check
from transport.errors import MemoryUnreachable
from transport.table.layout import Layer, Memory, Region
from transport.table.reader import TableReader

_logger = logging.getLogger(__name__)

PROGRAMS_BESIDE_DECODES = 24
"""What of the GPU a copy takes while other requests are being computed: 86 % of the link's peak, where 32 reach 90 % and cost a
decode step 2 % more (two H200s, `make bench-gpu`, sections interference and interference-32)."""
PROGRAMS_ALONE = 32
OPEN_SECONDS_MAX = 5.0


@dataclass(slots=True)
class _Peer:
    """An owner's memory as mapped in this process: the opened addresses, and the (3, layers) table that the gather reads."""

    opened: tuple[int, ...]
    layers: torch.Tensor


@dataclass(slots=True)
class _Copy:
    """An import under way. The tensors in `held` are read by the kernel: they must outlive it."""

    job: ImportJob
    reader: TableReader
    peer: "Future[_Peer]"
    programs: int
    open_until: float
    begin: torch.cuda.Event | None = None
    end: torch.cuda.Event | None = None
    held: tuple[torch.Tensor, ...] = ()


class CudaIpcTransport:
    """Serves and imports the blocks of `kv_caches` (torch CUDA tensors of one device, by layer name).

    Raises MemoryUnreachable, with what to change, for memory that cannot be shared or a layout that is not handled.
    """

    name: ClassVar[str] = "cuda_ipc"

    def __init__(
        self, kv_caches: Mapping[str, Any], num_blocks: int, rank: int = 0, groups: Mapping[str, int] | None = None
    ) -> None:
        geometries = layer_geometries(kv_caches, num_blocks, groups)
        self._device = next(iter(kv_caches.values())).device
        self._caches = tuple(kv_caches.values())
        addresses = [geometry.storage.data_ptr() + geometry.offset for geometry in geometries]
        if any(geometry.bytes % WORD_BYTES or geometry.stride % WORD_BYTES for geometry in geometries):
            raise MemoryUnreachable(f"a block of a layer is not a multiple of {WORD_BYTES} bytes")
        spans = [_allocation(address) for address in addresses]
        bases = list(dict.fromkeys(spans))
        regions = tuple(Region(_export(base), size) for base, size in bases)
        layers = tuple(
            Layer(bases.index(span), address - span[0], geometry.stride, geometry.bytes, geometry.group)
            for span, address, geometry in zip(spans, addresses, geometries, strict=True)
        )
        self._memory = Memory(rank, self.name, regions, layers)
        self._shape = [(geometry.group, geometry.bytes) for geometry in geometries]
        self._segments = segments_of(self._shape)
        self._own = self._table([(a, g.stride, g.bytes) for a, g in zip(addresses, geometries, strict=True)])
        self._stream = torch.cuda.Stream(self._device)
        self._opener = ThreadPoolExecutor(1, "peerkv-open", initializer=torch.cuda.set_device, initargs=(self._device,))
        self._peers: dict[tuple[str, int], Future[_Peer]] = {}
        self._copies: list[_Copy] = []
        self._compile()

    def memory(self) -> Memory:
        return self._memory

    def prepare(self, reader: TableReader) -> None:
        self._peer(reader)

    def start(self, job: ImportJob, reader: TableReader, *, gently: bool) -> None:
        peer = self._peer(reader)
        programs = PROGRAMS_BESIDE_DECODES if gently else PROGRAMS_ALONE
        copy = _Copy(job, reader, peer, programs, time.monotonic() + OPEN_SECONDS_MAX)
        self._copies.append(copy)
        if peer.done() and peer.exception() is None:
            self._launch(copy, peer.result())

    def poll(self) -> list[ImportResult]:
        results: list[ImportResult] = []
        going: list[_Copy] = []
        for copy in self._copies:
            if copy.end is None and copy.peer.done():
                error = copy.peer.exception()
                if error is not None:
                    results.append(_failed(copy, str(error)))
                    continue
                self._launch(copy, copy.peer.result())
            if copy.end is None and time.monotonic() > copy.open_until:
                results.append(_failed(copy, f"the memory of {copy.job.source} did not open in {OPEN_SECONDS_MAX} s"))
                continue
            if copy.end is None or not copy.end.query():
                going.append(copy)
                continue
            results.append(self._finish(copy))
        self._copies = going
        return results

    def pending(self) -> int:
        return len(self._copies)

    def retain(self, live: set[tuple[str, int]]) -> None:
        kept = live | {(copy.job.source, copy.job.epoch) for copy in self._copies}
        for owner in [owner for owner in self._peers if owner not in kept]:
            self._opener.submit(_close, self._peers.pop(owner))

    def close(self) -> None:
        self._stream.synchronize()
        self._copies.clear()
        self.retain(set())
        self._opener.shutdown(wait=True)

    def _peer(self, reader: TableReader) -> "Future[_Peer]":
        owner = (reader.name, reader.epoch)
        peer = self._peers.get(owner)
        if peer is None:
            peer = self._peers[owner] = self._opener.submit(self._open, reader.name, reader.num_blocks, reader.memories)
        return peer

    def _launch(self, copy: _Copy, peer: _Peer) -> None:
        """Enqueue the gather behind all that the engine enqueued before: the target blocks may still be read by it."""
        job = copy.job
        rows, pieces = plan(self._segments, job.groups())
        numbers = torch.from_numpy(np.concatenate((job.source_blocks, job.target_blocks, rows.ravel()))).pin_memory()
        copy.begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_device = numbers.to(self._device, non_blocking=True)
            blocks = on_device[: 2 * len(job)].view(2, -1)
            copy.begin.record()
            gather(peer.layers, self._own, self._segments, on_device[2 * len(job) :], pieces, blocks, copy.programs)
            end.record()
        copy.held = (numbers, on_device, peer.layers)
        copy.end = end

    def _finish(self, copy: _Copy) -> ImportResult:
        assert copy.begin is not None
        assert copy.end is not None
        failed, stale, reason = check(copy.job, copy.reader)
        nanoseconds = int(copy.begin.elapsed_time(copy.end) * 1e6)
        parts = copy.job.groups()
        size = sum(size * (parts[group].stop - parts[group].start) for group, size in self._shape)
        return ImportResult(copy.job, failed, stale, size, nanoseconds, reason)

    def _compile(self) -> None:
        """Compile the gather before the first import, by copying the null block 0 onto itself."""
        with torch.cuda.stream(self._stream):
            blocks = torch.zeros((2, 1), dtype=torch.int32, device=self._device)
            rows, pieces = plan(self._segments, [slice(0, 1)] * (1 + max(group for group, _ in self._shape)))
            gather(self._own, self._own, self._segments, torch.from_numpy(rows.ravel()).to(self._device), pieces, blocks, 1)
        self._stream.synchronize()

    def _table(self, layers: list[tuple[int, int, int]]) -> torch.Tensor:
        rows = [[address, stride, size // WORD_BYTES] for address, stride, size in layers]
        return torch.tensor(rows, dtype=torch.int64).t().contiguous().to(self._device)

    def _open(self, name: str, blocks: int, memories: tuple[Memory, ...]) -> _Peer:
        """Open an owner's memory; runs in the opener's thread, with the importer's own device current."""
        memory = next((m for m in memories if m.rank == self._memory.rank and m.transport == self.name), None)
        if memory is None or [(layer.group, layer.bytes) for layer in memory.layers] != self._shape:
            raise MemoryUnreachable(f"{name} offers no CUDA memory of our shape for rank {self._memory.rank}")
        for layer in memory.layers:
            inside = 0 <= layer.region < len(memory.regions) and layer.offset >= 0 and layer.stride >= layer.bytes
            if not inside or layer.offset + (blocks - 1) * layer.stride + layer.bytes > memory.regions[layer.region].size:
                raise MemoryUnreachable(f"{name} describes a layer that ends beyond its memory")
        opened: list[int] = []
        try:
            for region in memory.regions:
                opened.append(_import(region.handle))  # noqa: PERF401 - what was opened before a fault is closed below
            rows = [(opened[layer.region] + layer.offset, layer.stride, layer.bytes) for layer in memory.layers]
            with torch.cuda.stream(self._stream):
                table = self._table(rows)
            return _Peer(tuple(opened), table)
        except BaseException:
            _release(opened)
            raise


def _failed(copy: _Copy, reason: str) -> ImportResult:
    return ImportResult(copy.job, tuple(copy.job.target_blocks.tolist()), 0, 0, 0, reason)


def _allocation(address: int) -> tuple[int, int]:
    """Return (base, bytes) of the device allocation that holds `address`."""
    status, base, size = driver.cuMemGetAddressRange(address)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise MemoryUnreachable(f"the KV cache at {address:#x} is not a plain CUDA allocation: {status.name}")
    return int(base), int(size)


def _export(base: int) -> str:
    status, handle = runtime.cudaIpcGetMemHandle(base)
    if status != runtime.cudaError_t.cudaSuccess:
        raise MemoryUnreachable(
            f"CUDA IPC refuses the KV cache ({status.name}): start vLLM without expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
            " and without sleep mode"
        )
    return bytes(handle.reserved).hex()


def _import(handle: str) -> int:
    raw = bytes.fromhex(handle)
    shared = runtime.cudaIpcMemHandle_t()
    if len(raw) != len(bytes(shared.reserved)):
        raise MemoryUnreachable("a CUDA IPC handle of another length")
    shared.reserved = raw
    status, address = runtime.cudaIpcOpenMemHandle(shared, runtime.cudaIpcMemLazyEnablePeerAccess)
    if status != runtime.cudaError_t.cudaSuccess:
        raise MemoryUnreachable(
            f"CUDA IPC cannot open a peer's memory ({status.name}): the GPUs need peer access (nvidia-smi topo -p2p r), the"
            " processes one host and, in containers, one IPC and PID namespace"
        )
    return int(address)


def _release(opened: list[int] | tuple[int, ...]) -> None:
    for address in opened:
        (status,) = runtime.cudaIpcCloseMemHandle(address)
        if status != runtime.cudaError_t.cudaSuccess:
            _logger.warning("closing a peer's memory: %s", status.name)


def _close(peer: "Future[_Peer]") -> None:
    if peer.exception() is None:
        _release(peer.result().opened)
