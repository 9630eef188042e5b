"""Before host memory is used: one block of each KV cache group goes into a slot and back, and is compared.

What fails that is not used. The slot must be free: what is on offer from before a restart may be read meanwhile.
"""

import mmap
import os
from collections.abc import Iterable

import numpy as np

from engine.tiers.slots import Slots
from transport.backends.shared_memory import checksum, map_region
from transport.errors import MemoryUnreachable
from transport.table.layout import CHECKSUM_BYTES
from transport.table.quality import in_code
from transport.table.reader import TableReader

FAILED = "host memory failed its self-test"
_ONE = np.uint64(1)


def free_slot(slots: Slots, table: TableReader | None) -> int | None:
    """Return the first slot of those that a block takes which hold nothing that `table`, which is of an earlier life of this
    replica, offers; None if there are none, or the table has others."""
    whole = slots.memory.coded.whole if slots.memory.coded is not None else 1
    if table is None:
        return 0
    if slots.memory not in table.memories or table.num_blocks > slots.count:
        return None if table.cached_blocks() else 0
    states = table.states()
    taken = np.zeros(table.num_blocks + whole, np.bool_)
    offered = states & _ONE == 0
    taken[: table.num_blocks] = offered
    for slot in np.flatnonzero(offered & ~in_code(states)):
        taken[slot : slot + whole] = True
    free = np.flatnonzero(np.convolve(taken[: table.num_blocks], np.ones(whole, np.int64), "valid") == 0)
    return int(free[0]) if len(free) else None


def noise(size: int) -> bytes:
    """Return what a block of the test holds."""
    return os.urandom(size)


def compare(slots: Slots, slot: int, group: int, layers: Iterable[bytes], key: bytes) -> None:
    """Compare what a slot holds, as whoever imports it maps it, with a block's layers, and its checksum if it has one.

    Raises MemoryUnreachable if it is anything else.
    """
    memory = slots.memory
    own = [layer for layer in memory.layers if layer.group == group]
    mapped: mmap.mmap = map_region(memory.regions[0])
    try:
        for layer, wanted in zip(own, layers, strict=True):
            begin = layer.offset + slot * layer.stride
            if mapped[begin : begin + layer.bytes] != wanted:
                raise MemoryUnreachable(f"{FAILED}: a block of KV cache group {group} did not come back as it was stored")
        if memory.checksums is None:
            return
        said = memory.checksums.offset + slot * memory.checksums.stride
        begin, size = own[0].offset + slot * own[0].stride, sum(layer.bytes for layer in own)
        if checksum(memoryview(mapped[begin : begin + size]), key) != mapped[said : said + CHECKSUM_BYTES]:
            raise MemoryUnreachable(f"{FAILED}: a block of KV cache group {group} does not match its checksum")
    finally:
        mapped.close()
