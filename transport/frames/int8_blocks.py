"""Blocks coded by `int8` as slots of host memory hold them: the codec's payload without its levels, which are all the same.

So it has, for each part of the block, a bfloat16 scale for each row, then the codes.
"""

import numpy as np

from transport.frames.codec import Block
from transport.frames.lossy import INT8
from transport.frames.rows import Level, coded_bytes
from transport.frames.shape import Axis, Bytes, Role, Shape


def coded_size(shape: Shape) -> int:
    """Return the bytes of such a block when it is coded; 0 if it cannot be: states, and what is quantised already."""
    if any(part.role is Role.STATE for run in shape.runs for part in run.parts):
        return 0
    total = 0
    for run in shape.runs:
        for part in run.parts:
            width = part.count(Axis.DIM)
            rows = run.count * part.nbytes // part.number.nbytes // width
            total += coded_bytes(rows, width, part.number.nbytes, Level.INT8)
    return total


def encode(content: Bytes, shape: Shape) -> memoryview:
    """Return a block (shape.nbytes,) coded. Raises NotCoded for one with numbers that are not finite, or huge."""
    return memoryview(INT8.encode(Block(shape, content)))[shape.tokens :]


def payload(coded: Bytes, shape: Shape) -> Bytes:
    """Return what a frame of the codec `int8` has of a block that is coded already."""
    return np.concatenate((np.full(shape.tokens, Level.INT8, np.uint8), coded))


def decode(coded: Bytes, shape: Shape, out: Bytes) -> None:
    """Write a coded block into `out` (shape.nbytes,). Raises FrameDamaged for what is none of such a shape."""
    INT8.decode(payload(coded, shape).data, shape, out)
