"""The host-memory tier as a worker sees it: copies blocks into slots, in a thread, off the engine's path.

A block is complete when its store is begun, and no step overwrites it before `flush` returned: so every copy is right without a
check. A thread copies while the engine computes or waits; `flush` copies what the thread has not come to.
"""

import ctypes
import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable, Set
from functools import partial

import numpy as np

from engine.tiers.self_test import compare, noise
from engine.tiers.slots import Slots
from engine.tiers.stores import NO_STORES, Store, Stores
from transport.backends.shared_memory import SharedMemoryTransport, checksum, map_region
from transport.frames.errors import NotCoded
from transport.frames.shape import Bytes, unpacked
from transport.table.layout import CHECKSUM_BYTES, Coded
from transport.table.quality import IN_CODE

_logger = logging.getLogger(__name__)


class SlotWriter:
    """Writes one rank's part of a region. Raises MemoryUnreachable if it does not open."""

    def __init__(self, own: SharedMemoryTransport, slots: Slots) -> None:
        self._own = own  # its memory must last as long as the thread
        self._slots = slots
        memory = slots.memory
        assert memory.checksums is not None
        self._map: mmap.mmap = map_region(memory.regions[0], writable=True)
        self._bytes = memoryview(self._map)
        self._base = int(np.frombuffer(self._map, np.uint8).__array_interface__["data"][0])
        self._checksums = memory.checksums
        groups = {layer.group for layer in memory.layers}
        self._pieces = {
            group: [
                (address, stride, layer.offset, layer.bytes)
                for layer, (address, stride) in zip(memory.layers, own.layers(), strict=True)
                if layer.group == group
            ]
            for group in groups
        }
        self._waiting: deque[Store] = deque()
        self._coded = memory.coded
        self._encode = _encoder(memory.coded) if memory.coded is not None else None
        self._copied: deque[int] = deque()
        self._unfit: deque[int] = deque()
        self._closed = False
        self._calling = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def try_out(self, slot: int, block: int) -> None:
        """Store and compare a block of each KV cache group, by way of a new slot and a block that nobody uses yet, which keeps
        what it has. Raises MemoryUnreachable if one does not come back."""
        for group, pieces in self._pieces.items():
            places = [(address + block * stride, size) for address, stride, _, size in pieces]
            before, wanted = [ctypes.string_at(*place) for place in places], [noise(size) for _, size in places]
            try:
                for (address, size), content in zip(places, wanted, strict=True):
                    ctypes.memmove(address, content, size)
                key = noise(16)
                self._copy(Store(block, slot, group, key))
            finally:
                for (address, size), content in zip(places, before, strict=True):
                    ctypes.memmove(address, content, size)
            compare(self._slots, slot, group, wanted, key)
        self._copied.clear()

    def begin(self, stores: Stores) -> None:
        """Take in what a step brings; when this returns, what it overwrites has been copied."""
        overwritten = stores.overwritten | stores.imported
        if stores is NO_STORES or not (stores.begun or overwritten):
            return
        self._calling = True  # or the thread, which lets go of the lock for an instant, would mostly get it again
        with self._changed:
            self._calling = False
            if self._closed:
                return
            self._waiting.extend(stores.begun)
            self._flush(overwritten)
            if self._waiting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="peerkv-host-memory", daemon=True)
                    self._thread.start()
                self._changed.notify()

    def take_copied(self) -> list[int]:
        """Return the slots that were filled since the last call."""
        return [self._copied.popleft() for _ in range(len(self._copied))]

    def take_lost(self) -> list[int]:
        """Return the slots that were not filled, as their blocks cannot be coded: else all are copied before they are lost."""
        return [self._unfit.popleft() for _ in range(len(self._unfit))]

    def close(self) -> None:
        """End the copies, once the one under way is done: the engine's memory may go then."""
        self._calling = True
        with self._changed:
            self._calling = False
            self._closed = True
            self._waiting.clear()
            self._changed.notify()

    def _flush(self, blocks: Set[int]) -> None:
        urgent = [store for store in self._waiting if store.block in blocks]
        if urgent:
            self._waiting = deque(store for store in self._waiting if store.block not in blocks)
        for store in urgent:
            self._copy(store)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:  # held during a copy: `begin` waits for one block at most
                    while (not self._waiting or self._calling) and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                    self._copy(self._waiting.popleft())
        except Exception as error:  # noqa: BLE001 - whatever it is, the engine goes on without storing
            _logger.error("host memory is not written any more: %r", error)
            self.close()

    def _copy(self, store: Store) -> None:
        if store.quality & IN_CODE:
            self._code(store)
            return
        sums = self._checksums
        slot = store.slot * sums.stride
        begin = end = self._pieces[store.group][0][2] + slot
        for address, stride, offset, size in self._pieces[store.group]:
            ctypes.memmove(self._base + offset + slot, address + store.block * stride, size)
            end = offset + slot + size
        said = sums.offset + slot
        self._bytes[said : said + CHECKSUM_BYTES] = checksum(self._bytes[begin:end], store.key)
        self._copied.append(store.slot)

    def _code(self, store: Store) -> None:
        """Encode a block into its slot, from a copy of it: its layers lie apart."""
        coded, pieces = self._coded, self._pieces[store.group]
        assert coded is not None
        assert self._encode is not None
        content = np.empty(sum(size for *_, size in pieces), np.uint8)
        place, end = content.__array_interface__["data"][0], 0
        for address, stride, _, size in pieces:
            ctypes.memmove(place + end, address + store.block * stride, size)
            end += size
        try:
            code = self._encode(content)
        except NotCoded as error:
            _logger.info("a block is not stored: %s", error)
            self._unfit.append(store.slot)
            return
        begin = coded.offset + store.slot * coded.stride
        self._bytes[begin : begin + coded.bytes] = code
        said = begin + coded.checksum
        self._bytes[said : said + CHECKSUM_BYTES] = checksum(code, store.key)
        self._copied.append(store.slot)


def _encoder(coded: Coded) -> Callable[[Bytes], memoryview]:
    from transport.frames.slot_codes import encode  # it needs numba

    return partial(encode, coded.codec, shape=unpacked(bytes.fromhex(coded.shape)))
