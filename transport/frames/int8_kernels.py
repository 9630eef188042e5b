"""Loops of `int8` over rows of numbers.

A row is what one head keeps for one token, as bit patterns of bfloat16 (uint16, shift 16) or float32 (uint32, shift 0). A scale
is a bfloat16, as its 16 bits: the range of float32 in 2 bytes.
"""

from typing import Any

import numpy as np

from transport.frames.compiled import compiled


@compiled
def quantise(rows: Any, shift: Any, scales: Any, codes: Any) -> Any:
    """Write int8 `codes` (n, width) and their `scales` (n,); return the bits of the largest magnitude, as a float32.

    The scale of a row is its largest magnitude / 127, rounded up.
    """
    count, width = rows.shape
    bits = np.empty(width, np.uint32)
    values = bits.view(np.float32)
    one = np.empty(1, np.uint32)
    most = np.uint32(0)
    for row in range(count):
        top = np.uint32(0)
        for i in range(width):
            bits[i] = np.uint32(rows[row, i]) << shift
            top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
        most = max(most, top)
        one[0] = top
        one.view(np.float32)[0] /= np.float32(127.0)
        scale = (one[0] + np.uint32(0xFFFF)) >> np.uint32(16)
        scales[row] = scale
        one[0] = scale << np.uint32(16)
        divisor = one.view(np.float32)[0]
        inverse = np.float32(1.0) / divisor if divisor > np.float32(1e-37) else np.float32(0.0)
        for i in range(width):
            codes[row, i] = np.int8(np.rint(values[i] * inverse))
    return most


@compiled
def restore(scales: Any, codes: Any, shift: Any, rows: Any) -> None:
    """Write `rows` (n, width) from int8 codes, rounded to nearest, ties to even."""
    count, width = codes.shape
    bits = np.empty(width, np.uint32)
    values = bits.view(np.float32)
    one = np.empty(1, np.uint32)
    half = np.uint32(0x7FFF) if shift else np.uint32(0)
    odd = np.uint32(1) if shift else np.uint32(0)
    for row in range(count):
        one[0] = np.uint32(scales[row]) << np.uint32(16)
        scale = one.view(np.float32)[0]
        for i in range(width):
            values[i] = np.float32(codes[row, i]) * scale
        for i in range(width):
            rows[row, i] = (bits[i] + half + ((bits[i] >> np.uint32(16)) & odd)) >> shift
