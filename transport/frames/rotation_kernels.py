"""Loops of the rotated codecs over rows of numbers, 16 rows at a time, side by side: (width, LANES).

A row is what one head keeps for one token, as bit patterns of bfloat16 (uint16, shift 16) or float32 (uint32, shift 0). Its
coordinates are given random signs and a Walsh-Hadamard transform, after which they are nearly normal whatever the row was; each
is then rounded to a level of a codebook for N(0, 1). Source: TurboQuant (arXiv 2504.19874), its first stage.

Codes are packed in planes, so that loops over bytes do it: of four bits one plane, of three the low two and the high one. A
byte of a plane holds coordinates that are width / (codes per byte) apart.
"""

from typing import Any

import numpy as np

from transport.frames.compiled import compiled

LANES = 16
LEVELS_MAX = 8
"""Positive levels of a codebook as the loops take it; unused ones repeat the last and lie behind an infinite edge."""


@compiled
def _turn(flat: Any) -> None:
    """The transform of all lanes, in place, not normalised; `flat` (width * LANES,)."""
    step, end = LANES, len(flat)
    while step < end:
        for begin in range(0, end, 2 * step):
            left, right = flat[begin : begin + step], flat[begin + step : begin + 2 * step]
            for i in range(step):
                one, other = left[i], right[i]
                left[i] = one + other
                right[i] = one - other
        step *= 2


@compiled
def _sum(terms: Any, sums: Any) -> None:
    """Write each lane's sum (LANES,) of `terms` (width * LANES,), which are overwritten."""
    half = len(terms) // 2
    while half >= LANES:
        low, high = terms[:half], terms[half : 2 * half]
        for i in range(half):
            low[i] += high[i]
        half //= 2
    sums[:] = terms[:LANES]


@compiled
def _choose(flat: Any, levels: Any, edges: Any, negative: Any, chosen: Any, code: Any) -> None:
    """Write the nearest level's magnitude and its code: its number, plus `negative` below zero. Written out for speed."""
    e0, e1, e2, e3, e4, e5, e6 = edges[0], edges[1], edges[2], edges[3], edges[4], edges[5], edges[6]
    r0, r1, r2, r3 = levels[1] - levels[0], levels[2] - levels[1], levels[3] - levels[2], levels[4] - levels[3]
    r4, r5, r6 = levels[5] - levels[4], levels[6] - levels[5], levels[7] - levels[6]
    lowest, zero, one, none = levels[0], np.float32(0), np.int32(1), np.int32(0)
    for i in range(len(flat)):
        size = abs(flat[i])
        level = lowest
        level += r0 if size > e0 else zero
        level += r1 if size > e1 else zero
        level += r2 if size > e2 else zero
        level += r3 if size > e3 else zero
        level += r4 if size > e4 else zero
        level += r5 if size > e5 else zero
        level += r6 if size > e6 else zero
        chosen[i] = level
    for i in range(len(flat)):
        size = abs(flat[i])
        number = one if size > e0 else none
        number += one if size > e1 else none
        number += one if size > e2 else none
        number += one if size > e3 else none
        number += one if size > e4 else none
        number += one if size > e5 else none
        number += one if size > e6 else none
        number += negative if flat[i] < zero else none
        code[i] = np.uint8(number)


@compiled
def _pack(code: Any, shift: Any, bits: Any, plane: Any) -> None:
    """Write `bits` bits of each code (width * LANES,), from bit `shift` on, into `plane` (width * LANES * bits / 8,)."""
    each, mask = len(plane), np.uint8((1 << bits) - 1)
    plane[:] = 0
    for part in range(8 // bits):
        codes, place = code[part * each : (part + 1) * each], np.uint8(part * bits)
        for i in range(each):
            plane[i] |= np.uint8(((codes[i] >> shift) & mask) << place)


@compiled
def _unpack(plane: Any, shift: Any, bits: Any, code: Any) -> None:
    """Add what `_pack` wrote to the codes."""
    each, mask = len(plane), np.uint8((1 << bits) - 1)
    for part in range(8 // bits):
        codes, place = code[part * each : (part + 1) * each], np.uint8(part * bits)
        for i in range(each):
            codes[i] |= np.uint8(((plane[i] >> place) & mask) << shift)


@compiled
def _load(rows: Any, first: Any, lanes: Any, shift: Any, patterns: Any) -> Any:
    """Put `lanes` rows from `first` on side by side, zeros beside them; return the bits of the largest magnitude."""
    pattern, most = patterns.reshape(-1), np.uint32(0)
    if lanes < LANES:
        pattern[:] = 0
    for lane in range(lanes):
        for i in range(rows.shape[1]):
            patterns[i, lane] = np.uint32(rows[first + lane, i]) << shift
    for i in range(len(pattern)):
        most = max(most, pattern[i] & np.uint32(0x7FFFFFFF))
    return most


@compiled
def _multiply(values: Any, signs: Any, factors: Any) -> None:
    """Multiply (width, LANES) by a sign each coordinate (width,) and a factor each lane (LANES,), in place."""
    for i in range(len(signs)):
        sign = signs[i]
        for lane in range(LANES):
            values[i, lane] *= sign * factors[lane]


@compiled
def _normalise(values: Any, flat: Any, signs: Any, terms: Any, inverse: Any) -> None:
    """Turn the rows and bring them to variance 1; write what that multiplied them by (LANES,): 0 for rows of zeros."""
    for i in range(len(flat)):
        terms[i] = flat[i] * flat[i]
    _sum(terms, inverse)
    for lane in range(LANES):
        inverse[lane] = np.float32(1) / np.sqrt(inverse[lane]) if inverse[lane] > np.float32(1e-30) else np.float32(0)
    _multiply(values, signs, inverse)
    _turn(flat)  # which makes a row sqrt(width) times as long


@compiled
def _scales(flat: Any, chosen: Any, terms: Any, inverse: Any, width: Any, scales: Any) -> None:
    """Write the scales with the least squared error (LANES,), as float32."""
    length = np.empty(LANES, np.float32)
    for i in range(len(flat)):
        terms[i] = chosen[i] * chosen[i]
    _sum(terms, length)
    for i in range(len(flat)):
        terms[i] = abs(flat[i]) * chosen[i]
    _sum(terms, scales)
    for lane in range(LANES):
        known = inverse[lane] > np.float32(0)
        scales[lane] = scales[lane] / length[lane] / inverse[lane] / np.float32(width) if known else np.float32(0)


@compiled
def rotate(rows: Any, shift: Any, signs: Any, levels: Any, edges: Any, bits: Any, scales: Any, packed: Any) -> Any:
    """Write codes of `bits` bits (n, width * bits / 8) and `scales` (n,), bfloat16; return the bits of the largest, a float32.

    `signs` (width,) are 1 and -1, width a power of two.
    """
    count, width = rows.shape
    patterns = np.empty((width, LANES), np.uint32)
    values = patterns.view(np.float32)
    flat, chosen, terms = values.reshape(-1), np.empty(width * LANES, np.float32), np.empty(width * LANES, np.float32)
    code, planes = np.empty(width * LANES, np.uint8), np.empty((width * bits // 8, LANES), np.uint8)
    low = 4 if bits == 4 else 2
    low_plane, high_plane = planes[: width * low // 8].reshape(-1), planes[width * low // 8 :].reshape(-1)
    inverse, found = np.empty(LANES, np.float32), np.empty(LANES, np.uint32)
    most = np.uint32(0)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        most = max(most, _load(rows, first, lanes, shift, patterns))
        _normalise(values, flat, signs, terms, inverse)
        _choose(flat, levels, edges, np.int32(1 << (bits - 1)), chosen, code)
        _scales(flat, chosen, terms, inverse, width, found.view(np.float32))
        _pack(code, np.uint8(0), low, low_plane)
        if bits == 3:
            _pack(code, np.uint8(2), 1, high_plane)
        for lane in range(lanes):
            scale = found[lane]
            scales[first + lane] = (scale + np.uint32(0x7FFF) + ((scale >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            for i in range(len(planes)):
                packed[first + lane, i] = planes[i, lane]
    return most


@compiled
def _store(patterns: Any, first: Any, lanes: Any, shift: Any, rows: Any) -> None:
    """Write lanes back as rows, rounded to nearest, ties to even."""
    half, odd = (np.uint32(0x7FFF), np.uint32(1)) if shift else (np.uint32(0), np.uint32(0))
    for lane in range(lanes):
        for i in range(rows.shape[1]):
            found = patterns[i, lane]
            rows[first + lane, i] = (found + half + ((found >> np.uint32(16)) & odd)) >> shift


@compiled
def rotate_back(scales: Any, packed: Any, bits: Any, signs: Any, levels: Any, shift: Any, rows: Any) -> None:
    """Write `rows` (n, width) from what `rotate` wrote."""
    count, width = rows.shape
    patterns = np.empty((width, LANES), np.uint32)
    values = patterns.view(np.float32)
    flat = values.reshape(-1)
    code, planes = np.empty(width * LANES, np.uint8), np.zeros((width * bits // 8, LANES), np.uint8)
    low = 4 if bits == 4 else 2
    low_plane, high_plane = planes[: width * low // 8].reshape(-1), planes[width * low // 8 :].reshape(-1)
    scale_patterns = np.zeros(LANES, np.uint32)
    half = 1 << (bits - 1)
    book = np.empty(2 * half, np.float32)
    for k in range(half):
        book[k], book[half + k] = levels[k], -levels[k]
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        for lane in range(lanes):
            scale_patterns[lane] = np.uint32(scales[first + lane]) << np.uint32(16)
            for i in range(len(planes)):
                planes[i, lane] = packed[first + lane, i]
        code[:] = 0
        _unpack(low_plane, np.uint8(0), low, code)
        if bits == 3:
            _unpack(high_plane, np.uint8(2), 1, code)
        for i in range(len(flat)):
            flat[i] = book[code[i]]
        _turn(flat)
        _multiply(values, signs, scale_patterns.view(np.float32))
        _store(patterns, first, lanes, shift, rows)
