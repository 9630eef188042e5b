"""Which bytes are read for which blocks, and where they go. Pure."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transport.node.messages import NodeError, Placed

CHUNK_BYTES = 2 << 20
"""What is read by one transfer, of which NIXL tells no more than its end."""
ADDRESS_MAX = 1 << 62
"""No memory lies beyond: a node that says so means something else."""

_Span = tuple[int, int, int, int]
"""Block b's bytes from `at` on: address of block 0, stride, bytes, at."""


def group_spans(layers: Sequence[Placed], group: int) -> list[_Span]:
    """Return the dense runs of a block's bytes in the layers of a group: as in the table's order, neighbours joined."""
    found: list[_Span] = []
    at = 0
    for layer in layers:
        if layer.group != group:
            continue
        if not 0 < layer.bytes <= layer.stride <= ADDRESS_MAX or not 0 <= layer.address <= ADDRESS_MAX:
            raise NodeError("a layer of no possible size")
        if found and found[-1][1] == layer.stride and found[-1][0] + found[-1][2] == layer.address:
            address, stride, size, begin = found.pop()
            found.append((address, stride, size + layer.bytes, begin))
        else:
            found.append((layer.address, layer.stride, layer.bytes, at))
        at += layer.bytes
    return found


def chunks(
    layers: Sequence[Placed],
    ids: npt.NDArray[np.int64],
    counts: Sequence[int],
    sizes: Sequence[int],
    target: tuple[int, int, int],
) -> list[npt.NDArray[np.uint64]]:
    """Return what each transfer reads, uint64 (n, 3): offsets in our memory, addresses there, bytes.

    `counts` tells how many of the blocks `ids` are of each group; they have `sizes` bytes and go into slots of our memory:
    `target` is the offset of the first one, their stride, and how many there are. Raises NodeError for what does not fit.
    """
    offset, stride, slots = target
    found: list[npt.NDArray[np.uint64]] = []
    first = 0
    for group, count in enumerate(counts):
        spans = group_spans(layers, group) if count else []
        size = sum(span[2] for span in spans)
        if any(each != size for each in sizes[first : first + count]) or size > stride or first + count > slots:
            raise NodeError("it offers blocks of other sizes")
        each = max(1, CHUNK_BYTES // size) if size else 1
        for begin in range(first, first + count, each):
            rows = np.arange(begin, min(begin + each, first + count))
            piece = np.empty((len(rows), len(spans), 3), np.uint64)
            last = int(ids[rows].max())
            if any(address + last * step > ADDRESS_MAX for address, step, _, _ in spans):
                raise NodeError("it offers blocks beyond any memory")
            for place, (address, step, length, at) in enumerate(spans):
                piece[:, place, 0] = offset + rows * stride + at
                piece[:, place, 1] = address + ids[rows] * step
                piece[:, place, 2] = length
            found.append(piece.reshape(-1, 3))
        first += count
    return found
