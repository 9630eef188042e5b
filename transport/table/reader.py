"""A replica's block table, as others read it: which prefix blocks the replica holds right now.

One writer, the replica's scheduler; any number of readers, which take no lock and send no message. A reader believes a block
only if its state is even before and after its key was read, and a copy of it only if the state is still the same afterwards.
"""

import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from transport.errors import TableError
from transport.fingerprint import fingerprint_digest
from transport.groups import Group, flaw, import_bytes
from transport.keys import Keys
from transport.table import liveness
from transport.table.deliveries import Delivery, EngineLoad, PeerCounters
from transport.table.delivery_ring import DELIVERIES, WORDS, RingReader, delivery
from transport.table.fence import fence
from transport.table.journal import ENTRIES, JournalReader
from transport.table.layout import (
    BLOCKS_MAX,
    CHANGES_OFFSET,
    COUNTERS,
    COUNTERS_OFFSET,
    DESCRIPTION_BYTES_MAX,
    HEADER,
    HEARTBEAT_OFFSET,
    LOAD,
    LOAD_OFFSET,
    MAGIC,
    NEWEST_OFFSET,
    PAGE_BYTES,
    SUFFIX,
    VALID_OFFSET,
    VERSION,
    WAYS,
    Description,
    Layout,
    Memory,
    areas,
    bucket_count,
)
from transport.table.tiers import is_tier
from transport.table.waiting_area import listed, waits

__all__ = ["COUNTERS", "SUFFIX", "Run", "TableReader"]

_CHUNK_BLOCKS_MIN, _CHUNK_BLOCKS_MAX = 32, 4096
_ONE = np.uint64(1)
_LOAD_END = LOAD_OFFSET + 8 * len(LOAD)
_EVICTIONS = COUNTERS_OFFSET // 8 + COUNTERS.index("evictions")
_BUCKET_BYTES = 4 * WAYS
_SLOTS = struct.Struct(f"={WAYS}I").unpack_from
_VERIFIED = 16
"""Evenly spread places at which a chain found by bisection is verified."""


@dataclass(frozen=True, slots=True)
class Run:
    """The leading blocks of a chain that a table holds: block ids, int32 (n,), and their states, uint64 (n,)."""

    block_ids: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.block_ids)


class TableReader:
    """A read-only view of another process's table. Raises TableError if the file is not a whole table of this user's."""

    _fd = -1

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise TableError(f"{path}: {error.strerror}") from error
        try:
            self._open(path)
        except (struct.error, ValueError, OSError, msgspec.MsgspecError) as error:
            self.close()
            raise TableError(f"{path}: {error}") from error
        except TableError:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        found = os.fstat(self._fd)
        if found.st_uid != os.geteuid() or not stat.S_ISREG(found.st_mode) or found.st_size < PAGE_BYTES:
            raise TableError(f"{path}: not a table of this user's")
        self.inode = found.st_ino
        self._map = mmap.mmap(self._fd, found.st_size, prot=mmap.PROT_READ)
        magic, version, page, self.epoch, self.block_size, blocks, buckets, ways, length = HEADER.unpack_from(self._map)
        if magic != MAGIC or (version, page, ways) != (VERSION, PAGE_BYTES, WAYS):
            raise TableError(f"{path}: not a block table of version {VERSION}")
        layout = Layout(blocks, buckets, length)
        bounded = 0 < blocks <= BLOCKS_MAX and buckets == bucket_count(blocks) and length <= DESCRIPTION_BYTES_MAX
        if not bounded or self.block_size < 1 or layout.total != found.st_size:
            raise TableError(f"{path}: its sizes do not fit together")
        self.num_blocks: int = blocks
        self.description = msgspec.json.decode(self._map[PAGE_BYTES : PAGE_BYTES + length], type=Description)
        if wrong := flaw(self.description.groups, self.block_size):
            raise TableError(f"{path}: {wrong}")
        self.name = self.description.replica
        self._words = np.frombuffer(self._map, np.uint64, PAGE_BYTES // 8)
        self._states, self._keys, self._index, self._peers, *_ = areas(self._map, layout)
        self._mask = np.uint64(buckets - 1)
        self._bucket_mask = buckets - 1
        # single words are read several times faster this way than out of an array
        self._state_words = self._states.data
        self._key_words = self._keys.reshape(-1).data
        self._slots = self._index.reshape(-1).data
        self._head = self._words.data
        self._newest = self._words[NEWEST_OFFSET // 8 :].data
        rows = DELIVERIES * WORDS
        self._ring = RingReader(self._newest, np.frombuffer(self._map, np.uint64, rows, layout.deliveries).data)
        self.journal = JournalReader(
            self._words[CHANGES_OFFSET // 8 :].data, np.frombuffer(self._map, np.uint32, ENTRIES, layout.journal)
        )
        self._told = (b"", EngineLoad())
        self.fingerprint = fingerprint_digest(self.description.fingerprint)

    @property
    def pid(self) -> int:
        return self.description.pid

    @property
    def hash_name(self) -> str:
        return self.description.hash_name

    @property
    def transport(self) -> str:
        return self.description.transport

    @property
    def status(self) -> str:
        return self.description.status

    @property
    def fingerprint_fields(self) -> Mapping[str, str]:
        return self.description.fingerprint

    @property
    def memories(self) -> tuple[Memory, ...]:
        return self.description.memories

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.description.groups

    def slot_bytes(self) -> int:
        """Return the bytes of a tier's slot on all ranks; 0 for an engine's table."""
        return sum(memory.layers[0].stride for memory in self.memories if memory.layers) if is_tier(self.name) else 0

    def import_bytes(self) -> tuple[float, float]:
        """Return the bytes of an import from here: those that any long one has, and those for each token; zeros if unknown."""
        fixed, each = import_bytes(self.groups)
        return fixed * len(self.memories), each * len(self.memories)

    def alive(self) -> bool:
        """Tell whether the owner is still running, according to the kernel."""
        return self._fd >= 0 and liveness.claimed(self._fd)

    def longest_run(self, keys: Keys) -> Run:
        """Return the longest run of blocks from the start of `keys`, shape (n, 2), that the table holds at this moment."""
        ids: list[npt.NDArray[np.int32]] = []
        states: list[npt.NDArray[np.uint64]] = []
        for chunk in _chunks(keys):
            found, block_ids, seen = self.look_up(chunk)
            held = len(chunk) if found.all() else int(found.argmin())
            ids.append(block_ids[:held])
            states.append(seen[:held])
            if held < len(chunk):
                break
        return Run(np.concatenate(ids), np.concatenate(states))

    def look_up(self, keys: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
        """Return for each of `keys`, shape (n, 2), whether the table holds it at this moment, its block's id and its state."""
        first, second = keys[:, 0], keys[:, 1]
        # `take` picks rows several times faster than indexing does
        slots = self._index.take((first & self._mask).view(np.int64), axis=0).ravel()
        entries = np.flatnonzero(slots != 0)  # a bucket has one entry or two on average, of WAYS
        rows, blocks = entries // WAYS, slots.take(entries).astype(np.int64) - 1
        if len(blocks) and blocks.max() >= self.num_blocks:
            possible = blocks < self.num_blocks
            rows, blocks = rows[possible], blocks[possible]
        before = self._states.take(blocks)
        fence()
        stored = self._keys.take(blocks, axis=0)
        fence()
        after = self._states.take(blocks)
        same = (stored[:, 0] == first.take(rows)) & (stored[:, 1] == second.take(rows))
        match = np.flatnonzero(same & (before == after) & (before & _ONE == 0))[::-1]
        rows = rows.take(match)  # of several blocks under one key the first is taken
        found, block_ids, states = np.zeros(len(keys), np.bool_), np.zeros(len(keys), np.int32), np.zeros(len(keys), np.uint64)
        found[rows] = True
        block_ids[rows] = blocks.take(match)
        states[rows] = before.take(match)
        return found, block_ids, states

    def held_blocks(self, words: memoryview) -> int:
        """Return how many leading blocks of a chain the table holds; `words` are its keys, two uint64 each: for steering.

        A long run is found by bisection: engines evict the end of a chain before its front, so where the end is held, so is the
        rest. That is verified at `_VERIFIED` places, and looked up in full if one of them is not held; between them a missing
        block may go unseen.
        """
        blocks = len(words) // 2
        if not blocks or not self.holds(words[0], words[1]):  # as in most tables for most prompts
            return 0
        if blocks <= 2 * _VERIFIED:
            return self._first_missing(words, range(1, blocks))
        held = self._halved(words, blocks)
        places = range(max(1, held // _VERIFIED), held, max(1, held // _VERIFIED))
        if self._first_missing(words, places) < held:
            return len(self.longest_run(np.asarray(words[: 2 * held]).reshape(-1, 2)))
        return held

    def _first_missing(self, words: memoryview, places: range) -> int:
        """Return the first of some places of a chain whose block is not held, the end of `places` if all are."""
        slots, mask, most = self._slots, self._bucket_mask, self.num_blocks
        states, keys = self._state_words, self._key_words
        for place in places:
            low, high = words[2 * place], words[2 * place + 1]
            slot = slots[(low & mask) * WAYS]  # most blocks are the first in their bucket
            if slot and slot <= most and not states[slot - 1] & 1 and keys[2 * slot - 2] == low and keys[2 * slot - 1] == high:
                continue
            if not self.holds(low, high):
                return place
        return places.stop

    def _halved(self, words: memoryview, blocks: int) -> int:
        """Return how many of the first `blocks` blocks are held if there are no gaps; the first is held."""
        holds = self.holds
        low, high = 0, blocks - 1  # the block at low is held, that at high is not or does not exist
        if holds(words[2 * high], words[2 * high + 1]):
            return blocks
        while high - low > 1:
            middle = (low + high) // 2
            if holds(words[2 * middle], words[2 * middle + 1]):
                low = middle
            else:
                high = middle
        return high

    def holds(self, low: int, high: int) -> bool:
        """Tell whether the block under the key of these two words is held."""
        for slot in _SLOTS(self._slots, (low & self._bucket_mask) * _BUCKET_BYTES):
            if slot and slot <= self.num_blocks and self._state_words[slot - 1] & 1 == 0:
                place = 2 * slot - 2
                if self._key_words[place] == low and self._key_words[place + 1] == high:
                    return True
        return False

    def content(self, blocks: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint64], Keys]:
        """Return the states of `blocks`, (n,), and their keys, (n, 2). Where a state is odd the key means nothing.

        A block that changes meanwhile is told as invalid; the journal names it once more.
        """
        states = self._states[blocks]
        fence()
        keys = self._keys[blocks]
        fence()
        states[self._states[blocks] != states] |= _ONE
        return states, keys

    def key(self, block: int) -> bytes:
        """Return the key that a block has now, 16 bytes: it is the one that was looked up as long as the state is unchanged."""
        return bytes(self._keys[block])

    def states(self) -> npt.NDArray[np.uint64]:
        """Return a copy of every block's state, (blocks,): those that are even now and were another before came between."""
        return self._states.copy()

    def unchanged(self, block_ids: npt.NDArray[np.int32], states: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Tell for each block whether its content is still what it was when `states` was read. Call it after the copy."""
        fence()
        same: npt.NDArray[np.bool_] = self._states[block_ids] == states
        return same

    def cached_blocks(self) -> int:
        """Return how many blocks the table holds."""
        return self._head[VALID_OFFSET // 8]

    def evicted_blocks(self) -> int:
        """Return how many of its offered blocks the owner has reallocated or withdrawn since its epoch began."""
        return self._head[_EVICTIONS]

    def heartbeat_ns(self) -> int:
        """Return the CLOCK_MONOTONIC nanoseconds of the owner's last step, 0 if it has made none."""
        return int(self._words[HEARTBEAT_OFFSET // 8])

    def counters(self) -> dict[str, int]:
        """Return the owner's counters since its epoch began, by the names in COUNTERS."""
        start = COUNTERS_OFFSET // 8
        return dict(zip(COUNTERS, self._words[start : start + len(COUNTERS)].tolist(), strict=True))

    def load(self) -> EngineLoad:
        """Return the owner's last reported load: the same object as before if it has not changed."""
        told = self._map[LOAD_OFFSET:_LOAD_END]
        if told != self._told[0]:
            self._told = (told, EngineLoad(*memoryview(told).cast("Q").tolist()))
        return self._told[1]

    def waits(self, tag: int) -> bool:
        """Return whether a request waits for its first step; once the engine has ended, whether it did so then."""
        return waits(self._head, tag)

    def waiting(self) -> tuple[int, ...]:
        """Return the tags of the requests that wait for their first step."""
        return listed(self._head)

    def newest(self) -> int:
        """Return the number of the newest delivery record."""
        return int(self._newest[0])

    def deliveries(self, after: int) -> tuple[int, list[Delivery]]:
        """Return the number of the newest delivery record, and the records after number `after`, oldest first.

        Numbers count from 1 in each epoch: begin with 0 for a new reader. The last DELIVERIES records are kept; of
        `new - after` that were written, those not in the list were overwritten before they could be read.
        """
        if self._newest[0] == after:
            return after, []
        newest, rows = self._ring.read(after)
        found = []
        for words in rows:
            told = delivery(words, self._peers.names)
            if told is not None:
                found.append(told)
        return newest, found

    def peers(self) -> tuple[PeerCounters, ...]:
        """Return what the owner imported from each peer since its epoch began."""
        return self._peers.counters()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last array that refers to it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _chunks(keys: Keys) -> Iterator[Keys]:
    yield keys[:_CHUNK_BLOCKS_MIN]
    for start in range(_CHUNK_BLOCKS_MIN, len(keys), _CHUNK_BLOCKS_MAX):
        yield keys[start : start + _CHUNK_BLOCKS_MAX]
