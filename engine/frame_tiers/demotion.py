"""The way down: what engines stored in host memory is copied, encoded and written as frames, by a thread beside them.

Engines know nothing of it. A block is read like any holder's: its state before and after the copy, and its checksum, tell
whether it is what its key says. One that gave way before it was copied is lost, and counted.
"""

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.frame_tiers.model_frames import ModelFrames
from engine.frame_tiers.models import Models
from engine.frame_tiers.store import FrameId
from engine.frame_tiers.writing import Writer
from transport.backends.shared_memory import checksum, map_region
from transport.errors import SHORTAGES, MemoryUnreachable
from transport.frames.codec import Block, Codec
from transport.frames.codecs import named
from transport.frames.errors import NotCoded
from transport.frames.frame import write, write_payload
from transport.frames.shape import Bytes
from transport.table.directory import TableDirectory
from transport.table.layout import CHECKSUM_BYTES, Coded, Memory
from transport.table.quality import CARRIED, CODED, IN_CODE, LATER, LOSSY, mark_of
from transport.table.reader import TableReader
from transport.table.tiers import tier_kind

_logger = logging.getLogger("peerkv.tiers")

POLL_SECONDS = 0.05
WAIT_SECONDS_MAX = 0.5
"""How long a block waits for room in the queue of the nearest store: meanwhile it stays where it is, and may give way there.
For a farther one, which may take much less, it does not wait: the nearest would get no more than that either."""
NICENESS = 19
ENCODERS_MAX = 4
CORES_PER_ENCODER = 8
_ONE = np.uint64(1)


@dataclass(slots=True)
class _Watched:
    """A host-memory table: the states of its blocks when they were looked at last, and its memory, one map a rank."""

    reader: TableReader
    model: ModelFrames
    memories: tuple[Memory, ...]
    maps: tuple[mmap.mmap, ...]
    seen: npt.NDArray[np.uint64]
    published: int = field(default=0)
    """How many of the blocks that it says were ever stored are accounted for."""


class Demotion:
    """Copies what appears in the host-memory tables of `table_dir` to `writers()`, with `codec`. One thread, `start`ed.

    `lossy`, if any, codes the blocks of callers who accept loss.
    """

    def __init__(
        self, table_dir: Path, models: Models, writers: Callable[[], Sequence[Writer]], codec: str = "raw-z", lossy: str = ""
    ) -> None:
        self._tables = TableDirectory(table_dir)
        self._models = models
        self._writers = writers
        self._codec: Codec = named(codec)
        self._lossy: Codec | None = named(lossy) if lossy else None
        self._watched: dict[tuple[str, int], _Watched] = {}
        self._unreadable: set[tuple[str, int]] = set()
        self._encoders = ThreadPoolExecutor(
            max(1, min(ENCODERS_MAX, (os.cpu_count() or 1) // CORES_PER_ENCODER)), "peerkv-encoder", initializer=_be_nice
        )
        self._closing = threading.Event()
        self._generation = 0
        self._thread = threading.Thread(target=self._run, name="peerkv-demotion", daemon=True)
        self.lost = 0
        """Blocks that gave way in host memory before they were copied."""
        self.unknown = 0
        """Blocks that do not match their checksum, or of which it is not known what they are."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def forget(self) -> None:
        """What is being copied now is not handed on: before the writers are flushed."""
        self._generation += 1

    def close(self) -> None:
        """End, once the blocks under way are done."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._encoders.shutdown()
        self._tables.close()

    def look(self) -> int:
        """Look at all tables once, and copy what is new; return how many blocks that were."""
        live = self._live()
        for gone in self._watched.keys() - live.keys():
            del self._watched[gone]
        return sum(self._follow(self._watch(key, reader)) for key, reader in live.items())

    def _live(self) -> dict[tuple[str, int], TableReader]:
        tables = self._tables.tables()
        self._models.note(tables)
        return {(name, reader.epoch): reader for name, reader in tables.items() if tier_kind(name) == "host_memory"}

    def on_offer(self) -> Iterator[tuple[list[FrameId], int, Callable[[], list[bytes]]]]:
        """Yield of each block that is on offer now the ids of its frames, one a rank, the bytes that it takes on each, and what
        makes the frames: none of a block that gave way meanwhile, or of which it is not known what it is."""
        for key, reader in self._live().items():
            watched = self._watch(key, reader)
            if watched is None:
                continue
            coded, states = watched.memories[0].coded, reader.states()
            for slot in np.flatnonzero(states & _ONE == 0).tolist():
                state, block = int(states[slot]), reader.key(slot)
                size = coded.bytes if coded is not None and state & IN_CODE else max(watched.model.sizes)
                yield watched.model.ids(block), size, partial(self._frames, watched, slot, state, block)

    def _run(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                self.look()
            except Exception as error:  # noqa: BLE001 - whatever it is, what comes later is stored again
                _logger.error("blocks of host memory are not stored: %r", error)

    def _watch(self, key: tuple[str, int], reader: TableReader) -> _Watched | None:
        known = self._watched.get(key)
        if known is not None and known.reader is reader:
            return known
        model = self._models.find(reader.fingerprint)
        if model is None or key in self._unreadable:
            return None
        try:
            memories = tuple(sorted(reader.memories, key=lambda memory: memory.rank))
            maps = tuple(map_region(memory.regions[0]) for memory in memories)
        except (MemoryUnreachable, OSError) as error:
            if getattr(error.__cause__ or error, "errno", None) in SHORTAGES:  # which pass
                return None
            self._unreadable.add(key)
            _logger.warning("host memory of %s is not stored: %s", key[0], error)
            return None
        seen = known.seen if known is not None else np.ones(reader.num_blocks, np.uint64)
        stored = known.published if known is not None else reader.counters()["published_blocks"] - reader.cached_blocks()
        watched = self._watched[key] = _Watched(reader, model, memories, maps, seen, stored)
        return watched

    def _follow(self, watched: _Watched | None) -> int:
        if watched is None or not self._writers():
            return 0
        stored = watched.reader.counters()["published_blocks"]
        states = watched.reader.states()
        fresh = np.flatnonzero((states != watched.seen) & (states & _ONE == 0))
        watched.published += len(fresh)
        if stored > watched.published:  # came and went between two looks
            self.lost += stored - watched.published
            watched.published = stored
        watched.seen = states
        for _ in self._encoders.map(lambda slot: self._copy(watched, slot, int(states[slot])), fresh.tolist()):
            if self._closing.is_set():
                break
        return len(fresh)

    def _copy(self, watched: _Watched, slot: int, state: int) -> None:
        """Copy a block to every store that lacks it."""
        generation, reader, model, writers = self._generation, watched.reader, watched.model, self._writers()
        if self._closing.is_set():
            return
        key = reader.key(slot)
        ids = model.ids(key)
        wanting = [writer for writer in writers if not all(writer.store.knows(each) for each in ids)]
        if not wanting:
            return
        for each, frame in zip(ids, self._frames(watched, slot, state, key), strict=False):
            for writer in wanting:
                wait_seconds = WAIT_SECONDS_MAX if writer is writers[0] else 0.0
                writer.offer(each, frame, wait_seconds, lambda: generation == self._generation)

    def _frames(self, watched: _Watched, slot: int, state: int, key: bytes) -> list[bytes]:
        """Return the frames of a block, one a rank; none, counted, if it gave way, or does not match its checksum."""
        reader, model = watched.reader, watched.model
        read = _coded if state & IN_CODE else _content
        contents = [read(watched, rank, slot, key) for rank in range(len(model.ranks))]
        if not reader.unchanged(np.array([slot], np.int32), np.array([state], np.uint64))[0]:
            self.lost += 1
            return []
        if any(content is None for content in contents):
            self.unknown += 1
            return []
        frames = []
        for rank, found in enumerate(contents):
            assert found is not None
            group, content = found
            coded = watched.memories[rank].coded if state & IN_CODE else None
            frames.append(self._encode(model, content, model.ranks[rank], key, group, quality=state & CARRIED, coded=coded))
        return frames

    def _encode(
        self,
        model: ModelFrames,
        content: Bytes,
        fingerprint: bytes,
        key: bytes,
        group: int,
        *,
        quality: int,
        coded: Coded | None,
    ) -> bytes:
        """Return a block as a frame; `coded` says how it lies coded already."""
        shape, tenant = model.coded_shapes[group], mark_of(quality)
        about: dict[str, Any] = {"fingerprint": fingerprint, "key": key, "group": group, "tenant": tenant}
        about["secret"] = model.secrecy.key_of(tenant)
        if coded is not None and shape is not None:
            position = shape.tokens if quality & LATER else 0
            return write_payload(named(coded.codec), content, shape, position=position, **about)
        if quality & (LOSSY | CODED) == LOSSY and self._lossy is not None and shape is not None:
            with contextlib.suppress(NotCoded):
                block = Block(shape, content, position=shape.tokens if quality & LATER else 0)
                return write(self._lossy, block, **about)
        block = Block(model.shapes[group], content)
        lost = bool(quality & CODED)  # wherever it comes up, it is not coded again
        return write(self._codec, block, lossy=lost, **about)


def _content(watched: _Watched, rank: int, slot: int, key: bytes) -> tuple[int, Bytes] | None:
    """Return a copy of a block and the group that its frame names; None if it is no group's, or torn.

    What GPUs stored has no checksum: where not all groups' blocks are of one size, a byte beside it says what it is.
    """
    memory, mapped, model = watched.memories[rank], watched.maps[rank], watched.model
    start = min(layer.offset for layer in memory.layers) + slot * memory.layers[0].stride
    whole = np.frombuffer(mapped, np.uint8, max(model.sizes), start).copy()
    if memory.checksums is None:
        if memory.group_bytes is None:
            return (0, whole) if len(set(model.sizes)) == 1 else None
        place = memory.group_bytes.offset + slot * memory.group_bytes.stride
        told = int.from_bytes(mapped[place : place + 1], "little") - 1
        return (model.framed_group(told), whole[: model.sizes[told]]) if 0 <= told < len(model.sizes) else None
    said = memory.checksums.offset + slot * memory.checksums.stride
    mark = mapped[said : said + CHECKSUM_BYTES]
    for group, size in enumerate(model.sizes):
        if model.framed_group(group) == group and checksum(whole[:size].data, key) == mark:
            return group, whole[:size]
    return None


def _coded(watched: _Watched, rank: int, slot: int, key: bytes) -> tuple[int, Bytes] | None:
    """Return a block that lies coded as a frame's payload, and its group, which is the only one; None if it is torn, or coded
    in a way that a reader of frames would not expect."""
    from transport.frames.slot_codes import payload  # it needs numba

    coded, shape = watched.memories[rank].coded, watched.model.coded_shapes[0]
    if coded is None or shape is None or shape.packed.hex() != coded.shape:
        return None
    begin = coded.offset + slot * coded.stride
    code = np.frombuffer(watched.maps[rank], np.uint8, coded.bytes, begin).copy()
    if coded.checksum >= 0:
        said = begin + coded.checksum
        if checksum(code.data, key) != watched.maps[rank][said : said + CHECKSUM_BYTES]:
            return None
    return 0, payload(coded.codec, code, shape)


def _be_nice() -> None:
    """Encode when nobody else wants the core."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
