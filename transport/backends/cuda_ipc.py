"""KV memory on GPUs of one host: the importer opens the owner's allocations by CUDA IPC and gathers blocks over NVLink or PCIe.

The owner does nothing, and the owner's GPU need not be visible to the importer. An allocation is opened once for an owner's
epoch, in a thread of its own, because it takes milliseconds that the engine's step does not have. Host memory of tiers is read
by the same kernel, and this engine's own is written by it: it is opened otherwise (host_regions), in another thread, as that
takes seconds.
"""

import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from cuda.bindings import driver, runtime
from triton.errors import TritonError

from transport.backends.base import BlockSource, ImportJob, ImportResult, JobId, Place, outdated, place_of
from transport.backends.coded_blocks import shape_of
from transport.backends.coding import ALIGNED_BYTES, Rows, decode, encode, rows_of
from transport.backends.gather import WORD_BYTES, gather, plan, segments_of
from transport.backends.geometry import layer_geometries
from transport.backends.host_regions import HostRegions
from transport.backends.shared_memory import SharedMemoryTransport
from transport.backends.verification import check
from transport.errors import MemoryUnreachable
from transport.frames.shape import Shape
from transport.table.layout import Layer, Memory, Region, SlotCodec
from transport.table.quality import in_code

_logger = logging.getLogger(__name__)

PROGRAMS_BESIDE_DECODES = 24
"""What of the GPU a copy takes while other requests are being computed: 86 % of the link's peak, where 32 reach 90 % and cost a
decode step 2 % more (two H200s, `make bench-gpu`, sections interference and interference-32)."""
PROGRAMS_ALONE = 32
PROGRAMS_FROM_HOST, PROGRAMS_TO_HOST = 16, 8
"""Each keeps 64 KiB on the way, for which a read of host memory waits and a write to it does not."""
CODED_FROM_HOST: Mapping[SlotCodec, int] = {"int8": 48, "rot4": 64, "rot3": 64}
CODED_TO_HOST: Mapping[SlotCodec, int] = {"int8": 24, "rot4": 48, "rot3": 48}
"""Of programs that code or decode, each with at most 16 KiB on the way, and half the warps; those that rotate compute more
(H200, `python -m tests.gpu.bench code code-rot4`: more programs than these carry no more)."""
PART_BLOCKS_MIN = 512
"""Longer imports are copied in parts, so that what vLLM does with checked blocks is done while the rest is on its way."""
_PARTS = (1 / 2, 7 / 8)
OPEN_SECONDS_MAX = 5.0
PIECE_BLOCKS = 256
"""An import into blocks that are still being stored is cut into such pieces: while one is copied, the next one's are stored."""


@dataclass(frozen=True, slots=True)
class CodedSlots:
    """Where blocks lie coded: that of slot 0 at `address`, and what is in each."""

    address: int
    stride: int
    rows: Rows
    codec: SlotCodec


@dataclass(slots=True)
class Opened:
    """Memory as mapped in this process: the (3, layers) table that the gather reads, and what closes it."""

    layers: torch.Tensor
    mapped: ExitStack
    coded: CodedSlots | None = None


@dataclass(slots=True)
class Enqueued:
    """A copy on its way, of which `parts` are the ends of the parts. The tensors in `held` are read by the kernel: they must
    outlive it.

    `unfit`, int32 on the host, says at the end which of the blocks that were to be coded could not be: 1.
    """

    begin: torch.cuda.Event
    parts: tuple[torch.cuda.Event, ...]
    held: tuple[torch.Tensor, ...]
    unfit: torch.Tensor | None = None

    @property
    def end(self) -> torch.cuda.Event:
        """The end of the last part."""
        return self.parts[-1]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a launch finds its blocks of each KV cache group, and what it waits for; where those are that are coded."""

    groups: list[slice]
    after: torch.cuda.Event | None = None
    coded: slice | None = None


@dataclass(slots=True)
class _Copy:
    """An import under way, `from_host` if that is where its blocks are.

    `ends` tells behind how many blocks each part ends that is not checked yet, `checked` how many leading blocks are good, and
    `expected` when the whole copy ends (time.monotonic), judged by its first part.
    """

    job: ImportJob
    reader: BlockSource
    place: Place
    peer: "Future[Opened]"
    from_host: bool
    programs: int
    open_until: float
    ends: list[int]
    checked: int = 0
    began: float = 0.0
    expected: float = math.inf
    enqueued: Enqueued | None = None


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
        places = [*addresses, *(geometry.stride for geometry in geometries)]
        self._aligned = all(place % ALIGNED_BYTES == 0 for place in places)
        self._stream = torch.cuda.Stream(self._device)
        self._from_host, self._to_host = torch.cuda.Stream(self._device), torch.cuda.Stream(self._device)
        self._opener = ThreadPoolExecutor(1, "peerkv-open", initializer=_settle_in, initargs=(self._device,))
        self._pinner = ThreadPoolExecutor(1, "peerkv-pin", initializer=_settle_in, initargs=(self._device,))
        self._host = HostRegions()  # the pinner's
        self._peers: dict[Place, tuple[ThreadPoolExecutor, Future[Opened]]] = {}
        self._copies: list[_Copy] = []
        self._storing: deque[tuple[list[int], torch.cuda.Event]] = deque()
        """Blocks that may still be read by copies into host memory, and the end of each copy, which come in this order."""
        self._enqueued: torch.cuda.Event | None = None
        self._compile()

    def memory(self) -> Memory:
        return self._memory

    def prepare(self, reader: BlockSource) -> None:
        self._peer(reader)

    def before_step(self) -> None:
        self._enqueued = torch.cuda.Event()
        self._enqueued.record(torch.cuda.current_stream(self._device))

    def start(self, job: ImportJob, reader: BlockSource, *, gently: bool) -> None:
        memory = self._of_our_rank(reader.memories)
        if in_code(job.states).any() and (memory is None or memory.coded is None):
            raise MemoryUnreachable(f"{reader.name} has coded blocks, and does not say how they lie")
        peer, from_host = self._peer(reader), self._in_host_memory(reader.memories)
        programs = PROGRAMS_FROM_HOST if from_host else PROGRAMS_BESIDE_DECODES if gently else PROGRAMS_ALONE
        wait = 0.0 if from_host else OPEN_SECONDS_MAX  # pinning takes longer than computing a prompt
        copy = _Copy(job, reader, place_of(reader), peer, from_host, programs, time.monotonic() + wait, _part_ends(job))
        self._copies.append(copy)
        if peer.done() and peer.exception() is None:
            self._launch(copy, peer.result())

    def poll(self) -> list[ImportResult]:
        results: list[ImportResult] = []
        going: list[_Copy] = []
        for copy in self._copies:
            if copy.enqueued is None and copy.peer.done():
                error = copy.peer.exception()
                if error is not None:
                    results.append(_failed(copy, str(error)))
                    continue
                self._launch(copy, copy.peer.result())
            if copy.enqueued is None and time.monotonic() >= copy.open_until:
                results.append(_failed(copy, f"the memory of {copy.job.source} is not open yet", early=copy.from_host))
                continue
            if copy.enqueued is None or not copy.enqueued.end.query():
                if copy.enqueued is not None:
                    _check_parts(copy, copy.enqueued)
                going.append(copy)
                continue
            results.append(self._finish(copy, copy.enqueued))
        self._copies = going
        return results

    def pending(self) -> int:
        return len(self._copies)

    def checked(self) -> dict[JobId, int]:
        return {copy.job.id: copy.checked for copy in self._copies if copy.checked}

    def ends_within(self, seconds: float) -> bool:
        now = time.monotonic()
        return any(abs(copy.expected - now) <= seconds for copy in self._copies)

    def retain(self, live: set[tuple[str, int]]) -> None:
        for place in outdated(self._peers, live) - {copy.place for copy in self._copies}:
            thread, peer = self._peers.pop(place)
            thread.submit(_close, peer)

    def close(self) -> None:
        for stream in (self._stream, self._from_host, self._to_host):
            stream.synchronize()
        self._copies.clear()
        self._host.stop()
        self.retain(set())
        self._opener.shutdown(wait=True)
        self._pinner.shutdown(wait=True)

    # This engine's own host memory

    def open_slots(self, slots: Memory, count: int, try_out: Callable[[Opened], None] = lambda _: None) -> "Future[Opened]":
        """Open `count` slots, which lie as `slots` says, to write them; `close_slots` ends that. `try_out` sees them first, in
        the pinner's thread: they do not open if it raises."""

        def opened() -> Opened:
            found = self._open("this engine's host memory", count, (slots,))
            try:
                try_out(found)
            except BaseException:
                found.mapped.close()
                raise
            return found

        return self._pinner.submit(opened)

    def round_trips(self, slots: Opened, slot: int) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Yield for each KV cache group the layers of a random block, once they are in `slot`, and what came back from there.

        The engine's KV memory is not touched. For the pinner's thread.
        """
        groups = 1 + max(group for group, _ in self._shape)
        for group in range(groups):
            wanted = [os.urandom(size if each == group else WORD_BYTES) for each, size in self._shape]
            with torch.cuda.stream(self._stream):
                there = [torch.frombuffer(bytearray(each), dtype=torch.uint8).to(self._device) for each in wanted]
                back = [torch.zeros_like(each) for each in there]
                tables = [self._table([(each.data_ptr(), len(each), len(each)) for each in side]) for side in (there, back)]
            self._stream.synchronize()
            own = slice(0, 1)
            piece = [[_Piece([own if each == group else slice(0, 0) for each in range(groups)])]]
            first, last = np.zeros(1, np.int32), np.full(1, slot, np.int32)
            copies = (
                (self._to_host, (tables[0], slots.layers), (first, last), PROGRAMS_TO_HOST),
                (self._from_host, (slots.layers, tables[1]), (last, first), PROGRAMS_FROM_HOST),
            )
            for stream, sides, blocks, programs in copies:
                try:
                    self._enqueue(stream, sides, blocks, piece, programs, lambda _: None)
                finally:
                    stream.synchronize()
            of_group = [number for number, (each, _) in enumerate(self._shape) if each == group]
            yield [wanted[number] for number in of_group], [back[number].cpu().numpy().tobytes() for number in of_group]

    def codes(self, shape: Shape, codec: SlotCodec) -> bool:
        """Whether our blocks, which are of this shape, can be coded here. If so, the kernels are compiled, in seconds."""
        try:
            coded = CodedSlots(1 << 40, ALIGNED_BYTES, self._rows(shape), codec)
        except MemoryUnreachable as error:
            _logger.info("%s", error)
            return False
        none = torch.zeros((2, 0), dtype=torch.int32, device=self._device)
        try:
            with torch.cuda.stream(self._stream):
                self._encode(coded, none, none[0])
                self._decode(coded, none)
            self._stream.synchronize()
        except (TritonError, RuntimeError) as error:  # what a compiler raises when it meets what it cannot do
            _logger.warning("the kernels of %s do not compile for this GPU: %r", codec, error)
            return False
        return True

    def store(
        self,
        slots: Opened,
        groups: Sequence[tuple[Sequence[int], Sequence[int]]],
        coded: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> Enqueued:
        """Copy blocks of each KV cache group, told with the slots that they go into, behind all that the engine enqueued, and
        those in `coded` by coding them.

        Imports into these blocks wait for the copy, nothing else does: the caller sees to that.
        """
        all_of_them = [*groups, coded]
        sources, targets = (np.array([n for each in all_of_them for n in each[side]], np.int32) for side in (0, 1))
        ends = list(itertools.accumulate(len(blocks) for blocks, _ in all_of_them))
        *parts, others = (slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False))
        unfit = torch.zeros(len(coded[0]), dtype=torch.int32).pin_memory() if coded[0] else None

        def code(blocks: torch.Tensor) -> None:
            assert slots.coded is not None
            self._encode(slots.coded, blocks, unfit)

        self._to_host.wait_stream(torch.cuda.current_stream(self._device))
        tables = (self._own, slots.layers)
        pieces = [[_Piece(parts, coded=others if coded[0] else None)]]
        enqueued = self._enqueue(self._to_host, tables, (sources, targets), pieces, PROGRAMS_TO_HOST, code)
        enqueued.unfit = unfit
        self._storing.append((sources.tolist(), enqueued.end))
        return enqueued

    def hold_up(self, copy: Enqueued) -> None:
        """Have all that the engine enqueues from now on wait for a copy."""
        torch.cuda.current_stream(self._device).wait_event(copy.end)

    def close_slots(self, slots: "Future[Opened]") -> None:
        """Let go of slots once all copies into them have ended, which this waits for."""
        self._to_host.synchronize()
        self._pinner.submit(_close, slots)

    # Inside

    def _peer(self, reader: BlockSource) -> "Future[Opened]":
        place = place_of(reader)
        if place not in self._peers:
            thread = self._pinner if self._in_host_memory(reader.memories) else self._opener
            self._peers[place] = thread, thread.submit(self._open, reader.name, reader.num_blocks, reader.memories)
        return self._peers[place][1]

    def _in_host_memory(self, memories: tuple[Memory, ...]) -> bool:
        memory = self._of_our_rank(memories)
        return memory is not None and memory.transport == SharedMemoryTransport.name

    def _of_our_rank(self, memories: tuple[Memory, ...]) -> Memory | None:
        ways = (self.name, SharedMemoryTransport.name)
        return next((m for m in memories if m.rank == self._memory.rank and m.transport in ways), None)

    def _launch(self, copy: _Copy, peer: Opened) -> None:
        """Enqueue the gather behind what the engine enqueued before the import's step: it may still read the target blocks.

        Or before a later step in which other imports began: that comes to the same.
        """
        job = copy.job
        stream = self._from_host if copy.from_host else self._stream
        if self._enqueued is None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            stream.wait_event(self._enqueued)
        parts = [[slice(*each)] for each in pairwise([0, *copy.ends])] if len(copy.ends) > 1 else [job.groups()]
        stored = self._stored_by(job)
        pieces = [self._pieces(groups, stored) for groups in parts]
        order, pieces = _coded_last(in_code(job.states), pieces)
        blocks = (job.source_blocks[order], job.target_blocks[order])

        def restore(blocks: torch.Tensor) -> None:
            assert peer.coded is not None
            self._decode(peer.coded, blocks)

        copy.began = time.monotonic()
        copy.enqueued = self._enqueue(stream, (peer.layers, self._own), blocks, pieces, copy.programs, restore)

    def _stored_by(self, job: ImportJob) -> npt.NDArray[np.int64] | None:
        """Return for each target block which copy in `_storing` reads it last, -1 if none does; None if none reads any."""
        while self._storing and self._storing[0][1].query():
            self._storing.popleft()
        last = {block: number for number, (blocks, _) in enumerate(self._storing) for block in blocks}
        stored = np.array([last.get(block, -1) for block in job.target_blocks.tolist()] if last else [], np.int64)
        return stored if stored.max(initial=-1) >= 0 else None

    def _pieces(self, groups: list[slice], stored: npt.NDArray[np.int64] | None) -> list[_Piece]:
        """Cut a part of an import so that each piece waits only for those of its target blocks that are still being stored."""
        if stored is None:
            return [_Piece(groups)]
        pieces, cuts = [], max(1, -(-sum(group.stop - group.start for group in groups) // PIECE_BLOCKS))
        for cut in range(cuts):
            piece = [
                slice(*(group.start + (group.stop - group.start) * end // cuts for end in (cut, cut + 1))) for group in groups
            ]
            number = max(int(stored[each].max(initial=-1)) for each in piece)
            pieces.append(_Piece(piece, self._storing[number][1] if number >= 0 else None))
        return pieces

    def _enqueue(
        self,
        stream: torch.cuda.Stream,
        tables: tuple[torch.Tensor, torch.Tensor],
        blocks: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]],
        parts: list[list[_Piece]],
        programs: int,
        code: Callable[[torch.Tensor], None],
    ) -> Enqueued:
        """Have `stream` copy blocks between the memories of two address tables, both told source first.

        `code` does that for those that are coded on one side, int32 (2, n) on the device. `parts` are copied one after the
        other, and so are the pieces of each.
        """
        plans = [[plan(self._segments, piece.groups) for piece in pieces] for pieces in parts]
        numbers = np.concatenate((*blocks, *(rows.ravel() for part in plans for rows, _ in part)))
        pinned = torch.from_numpy(numbers).pin_memory()
        begin, *ends = (torch.cuda.Event(enable_timing=True) for _ in range(1 + len(plans)))
        count = 2 * len(blocks[0])
        with torch.cuda.stream(stream):
            on_device = pinned.to(self._device, non_blocking=True)
            ids, first = on_device[:count].view(2, -1), parts[0][0].after
            if first is not None:
                stream.wait_event(first)
            begin.record()
            for pieces, part, end in zip(parts, plans, ends, strict=True):
                for piece, (rows, chunks) in zip(pieces, part, strict=True):
                    if piece.after is not None:
                        stream.wait_event(piece.after)
                    gather(*tables, self._segments, on_device[count : count + rows.size], chunks, ids, programs)
                    if piece.coded is not None:
                        code(ids[:, piece.coded])
                    count += rows.size
                end.record()
        return Enqueued(begin, tuple(ends), (pinned, on_device, *tables))

    def _encode(self, slots: CodedSlots, blocks: torch.Tensor, unfit: torch.Tensor | None) -> None:
        encode(slots.codec, self._own, (slots.address, slots.stride), slots.rows, blocks, unfit, CODED_TO_HOST[slots.codec])

    def _decode(self, slots: CodedSlots, blocks: torch.Tensor) -> None:
        decode(slots.codec, (slots.address, slots.stride), self._own, slots.rows, blocks, CODED_FROM_HOST[slots.codec])

    def _rows(self, shape: Shape) -> Rows:
        """Return what the kernels need to know of our blocks. Raises MemoryUnreachable if they do not take them."""
        rows = rows_of(shape)
        same = shape.nbytes == sum(size for _, size in self._shape) and len(set(self._shape)) == 1
        if rows is None or not same or len(self._shape) != rows.layers or not self._aligned:
            raise MemoryUnreachable("blocks of this layout are not coded on a GPU")
        return rows

    def _finish(self, copy: _Copy, enqueued: Enqueued) -> ImportResult:
        rest = copy.job.part(copy.checked, len(copy.job)) if copy.checked else copy.job
        failed, stale, reason = check(rest, copy.reader)
        nanoseconds = int(enqueued.begin.elapsed_time(enqueued.end) * 1e6)
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

    def _open(self, name: str, blocks: int, memories: tuple[Memory, ...]) -> Opened:
        """Open an owner's memory; runs in the opener's thread or the pinner's, with the importer's own device current."""
        memory = self._of_our_rank(memories)
        if memory is None or [(layer.group, layer.bytes) for layer in memory.layers] != self._shape:
            raise MemoryUnreachable(f"{name} offers no CUDA memory of our shape for rank {self._memory.rank}")
        room = memory.coded.whole if memory.coded is not None else 1  # what is not coded has several slots side by side
        for layer in memory.layers:
            inside = 0 <= layer.region < len(memory.regions) and layer.offset >= 0 and layer.stride * room >= layer.bytes
            if not inside or layer.offset + (blocks - 1) * layer.stride + layer.bytes > memory.regions[layer.region].size:
                raise MemoryUnreachable(f"{name} describes a layer that ends beyond its memory")
            if layer.offset % WORD_BYTES or layer.stride % WORD_BYTES:
                raise MemoryUnreachable(f"{name} describes blocks that do not begin at multiples of {WORD_BYTES} bytes")
        in_host_memory = memory.transport != self.name
        with ExitStack() as mapped:
            bases = []
            for number, region in enumerate(memory.regions):
                if in_host_memory:
                    used = [layer for layer in memory.layers if layer.region == number]
                    begin = min((layer.offset for layer in used), default=0)
                    end = max((layer.offset + (blocks - 1) * layer.stride + layer.bytes for layer in used), default=0)
                    bases.append(self._host.open(region, begin, end))
                    mapped.callback(self._host.close, region, begin, end)
                else:
                    bases.append(_import(region.handle))
                    mapped.callback(_release, bases[-1])
            rows = [(bases[layer.region] + layer.offset, layer.stride, layer.bytes) for layer in memory.layers]
            coded = self._coded(memory, blocks, bases) if in_host_memory else None
            with torch.cuda.stream(self._stream):
                table = self._table(rows)
            return Opened(table, mapped.pop_all(), coded)

    def _coded(self, memory: Memory, blocks: int, bases: list[int]) -> CodedSlots | None:
        """Return where blocks may lie coded. Raises MemoryUnreachable if that cannot be read, or is outside of what is open."""
        coded = memory.coded
        if coded is None:
            return None
        rows = self._rows(shape_of(coded, sum(layer.bytes for layer in memory.layers)))
        of_layers = [layer for layer in memory.layers if layer.region == coded.region]
        begin = min((layer.offset for layer in of_layers), default=0)
        end = max((layer.offset + (blocks - 1) * layer.stride + layer.bytes for layer in of_layers), default=0)
        inside = begin <= coded.offset and coded.offset + (blocks - 1) * coded.stride + coded.bytes <= end
        fits = coded.bytes == rows.coded_bytes(coded.codec) <= coded.stride
        if not inside or not fits or (coded.offset | coded.stride) % ALIGNED_BYTES:
            raise MemoryUnreachable("a description of coded blocks that do not fit their memory")
        return CodedSlots(bases[coded.region] + coded.offset, coded.stride, rows, coded.codec)


def _part_ends(job: ImportJob) -> list[int]:
    """Return behind how many blocks of an import each of its parts ends."""
    count = len(job)
    cuts = _PARTS if count >= PART_BLOCKS_MIN and not job.counts else ()
    return [*(int(count * cut) for cut in cuts), count]


def _coded_last(coded: npt.NDArray[np.bool_], parts: list[list[_Piece]]) -> tuple[npt.NDArray[np.int64], list[list[_Piece]]]:
    """Return in which order the blocks of an import, of which some lie coded, are to be told, and its pieces then: in each the
    coded ones come last. Only blocks of a model with one KV cache group lie coded."""
    order = np.arange(len(coded))
    if not coded.any():
        return order, parts
    found = []
    for pieces in parts:
        sorted_ones = []
        for piece in pieces:
            (some,) = piece.groups
            which = coded[some]
            order[some] = some.start + np.concatenate((np.flatnonzero(~which), np.flatnonzero(which)))
            middle = some.stop - int(which.sum())
            last = slice(middle, some.stop) if which.any() else None
            sorted_ones.append(_Piece([slice(some.start, middle)], piece.after, last))
        found.append(sorted_ones)
    return order, found


def _check_parts(copy: _Copy, enqueued: Enqueued) -> None:
    """Check the parts that are copied since the last time, up to one that fails: that is left to the last check."""
    while len(copy.ends) > 1 and enqueued.parts[-len(copy.ends)].query():
        if copy.expected == math.inf:
            seconds = enqueued.begin.elapsed_time(enqueued.parts[0]) / 1e3
            copy.expected = copy.began + seconds * len(copy.job) / copy.ends[0]
        failed, _, _ = check(copy.job.part(copy.checked, copy.ends[0]), copy.reader)
        if failed:
            copy.ends = copy.ends[-1:]
        else:
            copy.checked = copy.ends.pop(0)


def _settle_in(device: torch.device) -> None:
    """Begin a thread that opens memory: on the engine's device, and no hindrance to the engine's capture of CUDA graphs.

    Source: cudaStreamCaptureModeGlobal, torch's default, forbids what may synchronise to all other threads, unless they say
    that what they do has nothing to do with the capture.
    """
    torch.cuda.set_device(device)
    runtime.cudaThreadExchangeStreamCaptureMode(runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)


def _failed(copy: _Copy, reason: str, *, early: bool = False) -> ImportResult:
    return ImportResult(copy.job, tuple(copy.job.target_blocks.tolist()), 0, 0, 0, reason, early)


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


def _release(address: int) -> None:
    (status,) = runtime.cudaIpcCloseMemHandle(address)
    if status != runtime.cudaError_t.cudaSuccess:
        _logger.warning("closing a peer's memory: %s", status.name)


def _close(peer: "Future[Opened]") -> None:
    if peer.exception() is None:
        peer.result().mapped.close()
