"""Memory for blocks that came up from a store, under a table of its own: engines import from it as from any other holder."""

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from pathlib import Path

import numpy as np

from engine.frame_tiers.model_frames import ModelFrames
from engine.tiers.slots import cut
from transport.backends.shared_memory import checksum, region_of
from transport.frames.shape import Bytes
from transport.table.layout import BLOCKS_MAX, CHECKSUM_BYTES, Description
from transport.table.writer import TableWriter


class Staging:
    """Slots for blocks of `model` in `size` bytes, under the name `name` in `table_dir`; those used longest ago give way.

    Thread safe. A block that gives way while an engine reads it fails the engine's check, and is computed. Raises NoSlots,
    TableError, OSError.
    """

    def __init__(self, table_dir: Path, name: str, model: ModelFrames, size: int) -> None:
        self._model = model
        self._fd = os.memfd_create(f"peerkv-{name}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, size)
            slots = [cut(region_of(self._fd, size), memory, len(model.memories)) for memory in model.memories]
            count = min(BLOCKS_MAX, *(each.count for each in slots))
            about = model.description
            self._memories = tuple(each.memory for each in slots)
            description = Description(
                name, os.getpid(), about.hash_name, about.transport, "ok", about.fingerprint, self._memories, about.groups
            )
            self._table = TableWriter(table_dir, description, model.block_size, count)
            self._map = mmap.mmap(self._fd, size)
        except BaseException:
            os.close(self._fd)
            raise
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._lock = threading.Lock()
        self._free = list(range(count))
        self._held: OrderedDict[bytes, int] = OrderedDict()
        self.clears = 0
        """How often everything was withdrawn."""
        self.name = name
        self.slots = count

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Return the places of the keys whose blocks are not here; the others give way last."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    self._held.move_to_end(key)
            return [place for place, key in enumerate(keys) if key not in self._held]

    def reserve(self, keep: Set[bytes]) -> int | None:
        """Return a slot to write to, withdrawing what is in it; None if only the blocks of `keep` could give way."""
        with self._lock:
            if self._free:
                return self._free.pop()
            going = next((key for key in self._held if key not in keep), None)
            if going is None:
                return None
            slot = self._held.pop(going)
            self._table.count("evictions", self._table.invalidate([slot]))
            return slot

    def target(self, slot: int, rank: int, group: int) -> Bytes:
        """Return where a block of `group` goes on one rank, (bytes,)."""
        layers = [layer for layer in self._memories[rank].layers if layer.group == group]
        begin = layers[0].offset + slot * layers[0].stride
        return self._bytes[begin : begin + self._model.sizes[group]]

    def publish(self, slot: int, key: bytes, group: int, clears: int, quality: int = 0) -> None:
        """Offer what was written to a slot, on every rank; `quality` are the bits of transport/table/quality.py.

        If the block is here already, or everything was withdrawn since there were `clears`, the slot is free again.
        """
        for rank, memory in enumerate(self._memories):
            assert memory.checksums is not None
            said = memory.checksums.offset + slot * memory.checksums.stride
            self._map[said : said + CHECKSUM_BYTES] = checksum(self.target(slot, rank, group).data, key)
        with self._lock:
            if key in self._held or clears != self.clears:
                self._free.append(slot)
                return
            self._table.publish([slot], np.frombuffer(key, np.uint64).reshape(1, 2), quality)
            self._held[key] = slot

    def release(self, slots: Iterable[int]) -> None:
        """Give back slots that were not published."""
        with self._lock:
            self._free += slots

    def clear(self) -> None:
        """Withdraw everything."""
        with self._lock:
            self.clears += 1
            self._table.count("evictions", self._table.clear())
            self._free += self._held.values()
            self._held.clear()

    def close(self) -> None:
        """End the table; the memory goes when nobody has it mapped any more."""
        with self._lock:
            self._table.close()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
