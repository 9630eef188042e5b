"""Every codec by name and by the number that frames have. 4 bits and less cost reasoning: they are for whoever names them."""

from collections.abc import Mapping

from transport.frames.codec import Codec
from transport.frames.errors import FrameNotRead
from transport.frames.lossless import Raw, RawZ

NUMBERS: Mapping[str, int] = {"raw": 0, "raw-z": 1, "int8": 2, "rot4": 3, "rot3": 4, "mix": 5}
NAMES = tuple(NUMBERS)
LOSSLESS: Mapping[str, Codec] = {codec.name: codec for codec in (Raw(), RawZ())}


def named(name: str) -> Codec:
    """Return a codec. Raises KeyError for an unknown name and ImportError for a lossy one without numba."""
    if name in LOSSLESS:
        return LOSSLESS[name]
    from transport.frames import lossy

    return {codec.name: codec for codec in (lossy.INT8, lossy.ROT4, lossy.ROT3, lossy.MIX)}[name]


def numbered(number: int) -> Codec:
    """Return the codec that a frame names. Raises FrameNotRead."""
    for name, known in NUMBERS.items():
        if known == number:
            try:
                return named(name)
            except ImportError as error:
                raise FrameNotRead(f"a frame of codec {name}, which needs numba") from error
    raise FrameNotRead(f"a frame of codec {number}, which this release does not know")
