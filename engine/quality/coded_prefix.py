"""The KV of a prefix, through frames and back: what an engine would restore from a tier."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from transport.frames import layouts
from transport.frames.codec import Block, Codec
from transport.frames.frame import read_into, write
from transport.frames.shape import Number

FINGERPRINT = bytes(16)


@dataclass(frozen=True, slots=True)
class Coded:
    """What came back, and the bytes that it took, headers and checksums included."""

    bits: npt.NDArray[np.uint16]
    frame_bytes: int


def coded(codec: Codec, bits: npt.NDArray[np.uint16], block_size: int) -> Coded:
    """Send KV (layers, heads, tokens, 2, dim), bfloat16 as bits, through one frame a block of `block_size` tokens."""
    layers, heads, tokens, _, dim = bits.shape
    shape = layouts.attention(layers, heads, block_size, dim, Number.BFLOAT16)
    found, size = np.empty_like(bits), 0
    for begin in range(0, tokens, block_size):
        content = np.ascontiguousarray(bits[:, :, begin : begin + block_size]).view(np.uint8).reshape(-1)
        key = begin.to_bytes(16, "little")
        frame = write(codec, Block(shape, content, begin, tokens - begin - block_size), fingerprint=FINGERPRINT, key=key)
        out = np.empty(shape.nbytes, np.uint8)
        read_into(out, frame, fingerprint=FINGERPRINT, key=key, shape=shape)
        found[:, :, begin : begin + block_size] = out.view(np.uint16).reshape(layers, heads, block_size, 2, dim)
        size += len(frame)
    return Coded(found, size)


def floats(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return bfloat16 numbers, given as bits, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
