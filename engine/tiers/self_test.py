"""Before host memory is used: one block of each KV cache group goes into a slot and back, and is compared.

What fails that is not used. Only new memory is tried out, at a replica's first start (`KeptMemory.new`): in what an earlier
engine knows, a slot may be on offer, or come to be while that engine ends, and be read meanwhile.
"""

import mmap
import os
from collections.abc import Iterable

from engine.tiers.slots import Slots
from transport.backends.shared_memory import checksum, map_region
from transport.errors import MemoryUnreachable
from transport.table.layout import CHECKSUM_BYTES

FAILED = "host memory failed its self-test"


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
