"""How a region of host memory is cut into slots: a block of any KV cache group fits into each, its layers side by side."""

from dataclasses import dataclass

from transport.table.layout import CHECKSUM_BYTES, Checksums, Layer, Memory, Region

SHARED_MEMORY = "shared_memory"
CUDA_IPC = "cuda_ipc"
ALIGNED_BYTES = 64


class NoSlots(ValueError):
    """There can be no host-memory tier; the message says why."""


@dataclass(frozen=True, slots=True)
class Slots:
    """`count` slots, whose bytes are described by `memory` as a table describes an engine's."""

    memory: Memory
    count: int


def cut(region: Region, own: Memory, ranks: int) -> Slots:
    """Return the slots of one of `ranks` ranks, whose KV memory is `own`: each has an equal part of the region.

    Slots that GPUs write have no checksums: the copy does not pass through a core that could compute them. Raises NoSlots if
    the KV memory is not of a kind that is stored, or a part has no room for a single block.
    """
    if own.transport not in (SHARED_MEMORY, CUDA_IPC):
        raise NoSlots(f"host memory is not handled yet for KV that is read by {own.transport}")
    sizes: dict[int, int] = {}
    for layer in own.layers:
        sizes[layer.group] = sizes.get(layer.group, 0) + layer.bytes
    content = max(sizes.values(), default=0)
    checked = own.transport == SHARED_MEMORY
    stride = _aligned(content + CHECKSUM_BYTES * checked)
    part = region.size // ranks // ALIGNED_BYTES * ALIGNED_BYTES
    count = part // stride
    if not content or not count:
        raise NoSlots(f"{part} bytes of host memory for a rank are less than one block, {stride} bytes")
    start, layers = part * own.rank, []
    filled = dict.fromkeys(sizes, start)
    for layer in own.layers:
        layers.append(Layer(0, filled[layer.group], stride, layer.bytes, layer.group))
        filled[layer.group] += layer.bytes
    checksums = Checksums(0, start + stride - CHECKSUM_BYTES, stride) if checked else None
    return Slots(Memory(own.rank, SHARED_MEMORY, (region,), tuple(layers), checksums), count)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
