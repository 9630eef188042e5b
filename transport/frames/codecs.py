"""Every codec by name and by the number that frames have. 4 bits and less cost reasoning: they are for whoever names them."""

from collections.abc import Mapping

import numpy as np

from transport.frames.codec import Block, Codec
from transport.frames.errors import FrameNotRead
from transport.frames.layouts import attention
from transport.frames.lossless import Raw, RawZ
from transport.frames.shape import Number

NUMBERS: Mapping[str, int] = {"raw": 0, "raw-z": 1, "int8": 2, "rot4": 3, "rot3": 4, "mix": 5, "neurokv": 6}
NAMES = tuple(NUMBERS)
LOSSLESS: Mapping[str, Codec] = {codec.name: codec for codec in (Raw(), RawZ())}


def named(name: str) -> Codec:
    """Return a codec. Raises KeyError for an unknown name and ImportError for a lossy one without numba."""
    if name in LOSSLESS:
        return LOSSLESS[name]
    from transport.frames import lossy

    return {codec.name: codec for codec in (lossy.INT8, lossy.ROT4, lossy.ROT3, lossy.MIX, lossy.NEUROKV)}[name]


def compile_codec(name: str) -> None:
    """Code a small block of each kind of number, so that a codec's loops are compiled before the first block that counts.

    Raises what `named` raises.
    """
    codec = named(name)
    for number in (Number.BFLOAT16, Number.FLOAT32):
        shape = attention(1, 1, 16, 64, number)
        payload = bytes(codec.encode(Block(shape, np.zeros(shape.nbytes, np.uint8))))
        codec.decode(memoryview(payload), shape, np.empty(shape.nbytes, np.uint8))


def numbered(number: int) -> Codec:
    """Return the codec that a frame names. Raises FrameNotRead."""
    for name, known in NUMBERS.items():
        if known == number:
            try:
                return named(name)
            except ImportError as error:
                raise FrameNotRead(f"a frame of codec {name}, which needs numba") from error
    raise FrameNotRead(f"a frame of codec {number}, which this release does not know")
