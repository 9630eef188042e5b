"""How a region of host memory is cut into slots: a block of any KV cache group fits into each, its layers side by side.

Where some blocks are coded, which takes half the room and little more, or a quarter, or a fifth, a slot fits one of these, and
as many side by side as that makes fit any block.
"""

from dataclasses import dataclass

import msgspec

from transport.frames.shape import Shape
from transport.table.layout import CHECKSUM_BYTES, Checksums, Coded, GroupBytes, Layer, Memory, Region, SlotCodec

SHARED_MEMORY = "shared_memory"
CUDA_IPC = "cuda_ipc"
ALIGNED_BYTES = 64
GROUP_MAX = 254
"""The highest number of a group that a byte tells."""


class NoSlots(ValueError):
    """There can be no host-memory tier; the message says why."""


@dataclass(frozen=True, slots=True)
class Slots:
    """`count` slots, whose bytes are described by `memory` as a table describes an engine's."""

    memory: Memory
    count: int


def cut(region: Region, own: Memory, ranks: int, shape: Shape | None = None, codec: SlotCodec = "int8") -> Slots:
    """Return the slots of one of `ranks` ranks, whose KV memory is `own`: each has an equal part of the region.

    `shape` is that of all blocks if some are to be coded, by `codec`.

    Slots that GPUs write have no checksums: the copy does not pass through a core that could compute them. Where sizes differ
    they have a byte that tells a block's group, for the way down to disk and vault. Raises NoSlots if
    the KV memory is not of a kind that is stored, or a part has no room for a single block.
    """
    if own.transport not in (SHARED_MEMORY, CUDA_IPC):
        raise NoSlots(f"host memory is not handled yet for KV that is read by {own.transport}")
    sizes: dict[int, int] = {}
    for layer in own.layers:
        sizes[layer.group] = sizes.get(layer.group, 0) + layer.bytes
    content = max(sizes.values(), default=0)
    checked = own.transport == SHARED_MEMORY
    told = not checked and len(set(sizes.values())) > 1 and max(sizes) <= GROUP_MAX
    whole = stride = _aligned(content + CHECKSUM_BYTES * checked + told)
    size, slots = 0, 1
    if shape is not None:
        from transport.frames.slot_codes import coded_size, codes_first  # it needs numba

        size = coded_size(codec, shape)
    if size:
        single = _aligned(size + CHECKSUM_BYTES * checked)
        slots = max(2, round(whole / single))
        stride = max(single, _aligned(-(-whole // slots)))
        whole = slots * stride
    part = region.size // ranks // ALIGNED_BYTES * ALIGNED_BYTES
    count = part // stride - (whole // stride - 1)  # every block's layers end within the part, whatever its number
    if not content or count < 1:
        raise NoSlots(f"{part} bytes of host memory for a rank are less than one block, {whole} bytes")
    start, layers = part * own.rank, []
    filled = dict.fromkeys(sizes, start)
    for layer in own.layers:
        layers.append(Layer(0, filled[layer.group], stride, layer.bytes, layer.group))
        filled[layer.group] += layer.bytes
    checksums = Checksums(0, start + whole - CHECKSUM_BYTES, stride) if checked else None
    coded = None
    if shape is not None and size:
        coded = Coded(0, start, stride, size, shape.packed.hex(), stride - CHECKSUM_BYTES if checked else -1)
        coded = msgspec.structs.replace(coded, codec=codec, whole=slots, first=codes_first(codec))
    groups = GroupBytes(0, start + whole - 1, stride) if told else None
    return Slots(Memory(own.rank, SHARED_MEMORY, (region,), tuple(layers), checksums, coded, groups), count)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED_BYTES) * ALIGNED_BYTES
