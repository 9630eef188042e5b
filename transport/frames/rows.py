"""How the rows of some tokens are coded: as they are, as int8, or rotated to 4, 3 or 2 bits a number.

A row is coded by itself: no scale is shared. A width that is no power of two is coded in pieces that are (576 = 512 + 64): this
keeps a latent's scale apart from that of its rotary key.
"""

from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from transport.frames import int8_kernels, rotation_kernels
from transport.frames.errors import NotCoded
from transport.frames.shape import Bytes

SCALE_BYTES = 2
WIDTH_MULTIPLE = 8
"""Packed codes of a piece fill whole bytes."""
MAGNITUDE_MAX = 1e15
"""The largest number that is coded: squares must not overflow. Infinities and what is not a number are above it."""
_MAGNITUDE_BITS_MAX = int(np.float32(MAGNITUDE_MAX).view(np.uint32))
_FLOAT16_MAX = 65504.0

_LEVELS = {
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
    3: (0.2451, 0.7560, 1.344, 2.152),
    2: (0.4528, 1.510),
}
"""Positive levels of the quantiser for N(0, 1) with the least squared error. Source: Max, Quantizing for minimum distortion
(1960), table I. They stand in frames: another table is another codec."""


class Level(IntEnum):
    """How a token's rows are coded, as frames say it, best first."""

    RAW = 0
    INT8 = 1
    ROT4 = 2
    ROT3 = 3
    ROT2 = 4

    @property
    def bits(self) -> int:
        """Bits of a number, without scales; 0 for RAW, which has those of the block."""
        return (0, 8, 4, 3, 2)[self]


def coded_bytes(rows: int, width: int, item: int, level: Level) -> int:
    """Return the size of `rows` rows of `width` numbers of `item` bytes each."""
    if level is Level.RAW:
        return rows * width * item
    return rows * (len(_pieces(width)) * SCALE_BYTES + width * level.bits // 8)


def encode_rows(rows: npt.NDArray[Any], level: Level) -> list[memoryview]:
    """Return `rows` (n, width), contiguous, coded. Raises NotCoded for values above MAGNITUDE_MAX.

    bfloat16 as uint16, float32 as uint32, float16 as itself.
    """
    if level is Level.RAW:
        return [rows.data]
    if rows.dtype == np.float16:
        rows = rows.astype(np.float32).view(np.uint32)
    shift, most = _shift(rows), 0
    coded: list[memoryview] = []
    for piece in _pieces(rows.shape[1]):
        part = _read_only(np.ascontiguousarray(rows[:, piece]))
        count, width = part.shape
        scales = np.empty(count, np.uint16)
        codes = np.empty((count, width * level.bits // 8), np.uint8)
        if level is Level.INT8:
            found = int8_kernels.quantise(part, shift, scales, codes.view(np.int8))
        else:
            levels, edges = codebook(level.bits)
            found = rotation_kernels.rotate(part, shift, signs(width), levels, edges, level.bits, scales, codes)
        most = max(most, int(found))
        coded += [scales.data, codes.data]
    if most > _MAGNITUDE_BITS_MAX:
        raise NotCoded(f"a block with values that are not finite, or above {MAGNITUDE_MAX:g}: store it with `raw-z`")
    return coded


def decode_rows(coded: Bytes, rows: npt.NDArray[Any], level: Level) -> None:
    """Write `rows` (n, width), contiguous, of the type that they had, from exactly `coded_bytes` bytes."""
    if level is Level.RAW:
        rows.reshape(-1).view(np.uint8)[:] = coded
        return
    target = np.empty(rows.shape, np.uint32) if rows.dtype == np.float16 else rows
    shift, place = _shift(target), 0
    for piece in _pieces(rows.shape[1]):
        count, width = len(rows), piece.stop - piece.start
        scales = coded[place : place + count * SCALE_BYTES].copy().view(np.uint16)
        place += count * SCALE_BYTES
        size = width * level.bits // 8
        codes = _read_only(coded[place : place + count * size].reshape(count, size))
        place += count * size
        whole = width == rows.shape[1]
        part = target if whole else np.empty((count, width), target.dtype)
        if level is Level.INT8:
            int8_kernels.restore(scales, codes.view(np.int8), shift, part)
        else:
            levels, _ = codebook(level.bits)
            rotation_kernels.rotate_back(scales, codes, level.bits, signs(width), levels, shift, part)
        if not whole:
            target[:, piece] = part
    if target is not rows:
        rows[:] = np.clip(target.view(np.float32), -_FLOAT16_MAX, _FLOAT16_MAX)


def _read_only(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view that cannot be written to: numba compiles anew for those that can."""
    view = numbers.view()
    view.flags.writeable = False
    return view


def _shift(rows: npt.NDArray[Any]) -> np.uint32:
    return np.uint32(16 if rows.dtype == np.uint16 else 0)


@lru_cache(maxsize=64)
def _pieces(width: int) -> tuple[slice, ...]:
    """The powers of two that a width is the sum of, largest first."""
    pieces, begin = [], 0
    for bit in reversed(range(width.bit_length())):
        if width >> bit & 1:
            pieces.append(slice(begin, begin + (1 << bit)))
            begin += 1 << bit
    return tuple(pieces)


@lru_cache(maxsize=64)
def signs(width: int) -> npt.NDArray[np.float32]:
    """Random signs (width,), the same for everybody: frames are written with them."""
    digests = (xxhash.xxh3_128_digest(b"peerkv-signs %d %d" % (width, part)) for part in range(-(-width // 128)))
    bits = np.unpackbits(np.frombuffer(b"".join(digests), np.uint8))[:width]
    return (1 - 2 * bits.astype(np.float32)).astype(np.float32)


@lru_cache(maxsize=4)
def codebook(bits: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Levels (LEVELS_MAX,) and the edges between them, padded as `rotation_kernels` wants it."""
    given = np.array(_LEVELS[bits], np.float32)
    levels = np.full(rotation_kernels.LEVELS_MAX, given[-1], np.float32)
    levels[: len(given)] = given
    edges = np.full(rotation_kernels.LEVELS_MAX - 1, np.inf, np.float32)
    edges[: len(given) - 1] = (given[1:] + given[:-1]) / 2
    return levels, edges
