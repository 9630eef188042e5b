"""Blocks coded by `int8`, `rot4` or `rot3` as slots of host memory hold them: the codec's payload without its levels, which are
all the same.

So it has, for each part of the block, a bfloat16 scale for each row, then the codes. A sequence's first block, of which the
rotating codecs keep some tokens raw, is not coded by these here: it would be longer than the others.
"""

import numpy as np

from transport.frames import lossy
from transport.frames.codec import Block
from transport.frames.rows import Level, coded_bytes
from transport.frames.shape import Axis, Bytes, Role, Shape
from transport.table.layout import SlotCodec

_CODECS = {
    "int8": (lossy.INT8, Level.INT8),
    "rot4": (lossy.ROT4, Level.ROT4),
    "rot3": (lossy.ROT3, Level.ROT3),
}


def codes_first(codec: SlotCodec) -> bool:
    """Whether a sequence's first block is coded like any other."""
    return codec == "int8"


def coded_size(codec: SlotCodec, shape: Shape) -> int:
    """Return the bytes of such a block when it is coded; 0 if it cannot be: states, and what is quantised already."""
    if any(part.role is Role.STATE for run in shape.runs for part in run.parts):
        return 0
    total = 0
    for run in shape.runs:
        for part in run.parts:
            width = part.count(Axis.DIM)
            rows = run.count * part.nbytes // part.number.nbytes // width
            total += coded_bytes(rows, width, part.number.nbytes, _CODECS[codec][1])
    return total


def encode(codec: SlotCodec, content: Bytes, shape: Shape) -> memoryview:
    """Return a block (shape.nbytes,) coded. Raises NotCoded for one with numbers that are not finite, or huge."""
    return memoryview(_CODECS[codec][0].encode(Block(shape, content, position=lossy.SINK_TOKENS)))[shape.tokens :]


def payload(codec: SlotCodec, coded: Bytes, shape: Shape) -> Bytes:
    """Return what a frame of the codec has of a block that is coded already."""
    return np.concatenate((np.full(shape.tokens, _CODECS[codec][1], np.uint8), coded))


def decode(codec: SlotCodec, coded: Bytes, shape: Shape, out: Bytes) -> None:
    """Write a coded block into `out` (shape.nbytes,). Raises FrameDamaged for what is none of such a shape."""
    _CODECS[codec][0].decode(payload(codec, coded, shape).data, shape, out)
