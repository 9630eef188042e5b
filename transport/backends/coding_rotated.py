"""Kernels of rot4 and rot3: transport/frames/rotation_kernels.py on a GPU, in the same order of the same operations.

A butterfly of the transform adds to each number the one whose coordinate differs in one bit. That one comes as the sum of both
bit patterns, less the own: exact, and a compiler makes a shuffle of it. Sums of rows are taken in halves as well, of two terms
each, so that no order is left open.
"""

import numpy as np
import triton
import triton.language as tl

from transport.backends.coding_rows import VARYING, read_rows, rows_of_piece, write_rows
from transport.frames.rows import MAGNITUDE_MAX, codebook

PIECE_NUMBERS_MAX, WARP_NUMBERS = 8192, 1024
_TOO_LARGE = tl.constexpr(int(np.float32(MAGNITUDE_MAX).view(np.uint32)))
_NOTHING = tl.constexpr(float(np.float32(1e-30)))


def _constants(bits: int) -> tuple[tl.constexpr, tl.constexpr, tl.constexpr]:
    """Return the levels of a codebook, the edges between them, and what each level is above the one before."""
    levels, edges = codebook(bits)
    count = 1 << (bits - 1)
    risen = np.cumsum(np.diff(levels[:count], prepend=np.float32(0)), dtype=np.float32)
    return tuple(tl.constexpr(tuple(each.tolist())) for each in (levels[:count], edges[: count - 1], risen))


_LEVELS4, _EDGES4, _RISEN4 = _constants(4)
_LEVELS3, _EDGES3, _RISEN3 = _constants(3)


@triton.jit  # type: ignore[untyped-decorator]
def _signs(SIGNS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 1.0 or -1.0 for each coordinate (1, WIDTH): -1.0 where the bit of that number is set."""
    column = tl.arange(0, WIDTH)[None, :]
    bits = column * 0
    for word in tl.static_range(WIDTH // 16):
        bits = tl.where(column // 16 == word, (SIGNS >> (16 * word)) & 0xFFFF, bits)
    return (1 - 2 * ((bits >> (column % 16)) & 1)).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    block, row, rows, kind, tokens, head_step, token_step,
    FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
):  # fmt: skip
    """Return rows of a block (PIECE_ROWS, WIDTH), read in eighths: so a thread has numbers of each, and adds them up alone."""
    E: tl.constexpr = WIDTH // 8
    a = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 0, E)
    b = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, E, E)
    c = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 2 * E, E)
    d = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 3 * E, E)
    e = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 4 * E, E)
    f = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 5 * E, E)
    g = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 6 * E, E)
    h = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 7 * E, E)
    joined = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    return tl.reshape(tl.trans(joined, (0, 4, 3, 2, 1)), (PIECE_ROWS, WIDTH))


@triton.jit  # type: ignore[untyped-decorator]
def _turn(values, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the Walsh-Hadamard transform of rows (ROWS, WIDTH), not normalised."""
    column = tl.arange(0, WIDTH)[None, :]
    for stage in tl.static_range(STAGES):
        bits = values.to(tl.int32, bitcast=True)
        pairs = tl.reshape(bits, (ROWS, WIDTH >> (stage + 1), 2, 1 << stage))
        other = tl.reshape(tl.sum(pairs, axis=2, keep_dims=True) - pairs, (ROWS, WIDTH))
        negated = bits ^ (((column >> stage) & 1) << 31)  # where it is the second of the two
        values = other.to(tl.float32, bitcast=True) + negated.to(tl.float32, bitcast=True)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _total(terms, ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sums (ROWS,) of rows (ROWS, WIDTH), the halves of a row added up first."""
    for stage in tl.static_range(STAGES):
        terms = tl.sum(tl.reshape(terms, (ROWS, 2, WIDTH >> (stage + 1))), axis=1)
    return tl.reshape(terms, (ROWS,))


@triton.jit  # type: ignore[untyped-decorator]
def _packed(codes, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return planes of codes of `BITS` bits, uint8 (ROWS, WIDTH * BITS / 8)."""
    EACH: tl.constexpr = 8 // BITS
    place = (tl.arange(0, EACH) * BITS)[None, :, None]
    return tl.sum(tl.reshape(codes, (ROWS, EACH, WIDTH // EACH)) << place, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _unpacked(plane, ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the codes (ROWS, WIDTH) of a plane, int32 (ROWS, WIDTH * BITS / 8)."""
    EACH: tl.constexpr = 8 // BITS
    place = (tl.arange(0, EACH) * BITS)[None, :, None]
    return tl.reshape((plane[:, None, :] >> place) & ((1 << BITS) - 1), (ROWS, WIDTH))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)  # type: ignore[untyped-decorator]
def encode_pieces(  # type: ignore[no-untyped-def]
    bases, strides, blocks, unfit, slots, slot_stride, layers, rows, pieces, count, tokens, head_step, token_step,
    FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
    BITS: tl.constexpr, SIGNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    EDGES: tl.constexpr = _EDGES4 if BITS == 4 else _EDGES3
    RISEN: tl.constexpr = _RISEN4 if BITS == 4 else _RISEN3
    signs = _signs(SIGNS, WIDTH)
    column = tl.arange(0, WIDTH // 2)[None, :]
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        place, layer, kind, row = rows_of_piece(piece, layers, rows, PIECE_ROWS)
        block = tl.load(bases + layer) + tl.load(blocks + place).to(tl.int64) * tl.load(strides + layer)
        values = _read(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, PIECE_ROWS)
        top = tl.max(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)

        square = _total(values * values, PIECE_ROWS, WIDTH, STAGES)
        inverse = tl.where(square > _NOTHING, tl.div_rn(1.0, tl.sqrt_rn(square)), 0.0)
        values = _turn(values * (signs * inverse[:, None]), PIECE_ROWS, WIDTH, STAGES)
        size = tl.abs(values)
        codes = tl.where(values < 0.0, 1 << (BITS - 1), 0)
        level = tl.where(size > EDGES[0], RISEN[1], RISEN[0])
        codes += (size > EDGES[0]).to(tl.int32)
        for k in tl.static_range(1, (1 << (BITS - 1)) - 1):
            codes += (size > EDGES[k]).to(tl.int32)
            level = tl.where(size > EDGES[k], RISEN[k + 1], level)
        length = _total(level * level, PIECE_ROWS, WIDTH, STAGES)
        along = _total(size * level, PIECE_ROWS, WIDTH, STAGES)
        found = tl.div_rn(tl.div_rn(tl.div_rn(along, length), inverse), WIDTH * 1.0)
        bits = tl.where(inverse > 0.0, found, 0.0).to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)

        if BITS == 4:
            packed = _packed(codes, PIECE_ROWS, WIDTH, 4)
        else:
            low = _packed(codes & 3, PIECE_ROWS, WIDTH, 2)
            high = _packed(codes >> 2, PIECE_ROWS, WIDTH, 1)
            high = tl.reshape(tl.broadcast_to(high[:, None, :], (PIECE_ROWS, 2, WIDTH // 8)), (PIECE_ROWS, WIDTH // 4))
            packed = tl.reshape(tl.trans(tl.join(low, high), (0, 2, 1)), (PIECE_ROWS, WIDTH // 2))
        slot = slots + tl.load(blocks + count + place).to(tl.int64) * slot_stride
        first = (kind * layers + layer) * rows
        inside = row < rows
        tl.store(slot.to(tl.pointer_type(tl.int16)) + first + row, scale, mask=inside)
        coded = slot + 4 * layers * rows + first.to(tl.int64) * (WIDTH * BITS // 8)
        target = tl.multiple_of(coded.to(tl.pointer_type(tl.uint8)), 16) + row[:, None] * (WIDTH * BITS // 8) + column
        tl.store(target, packed.to(tl.uint8), mask=inside[:, None] & (column < WIDTH * BITS // 8))
        tl.store(unfit + place, 1, mask=top > _TOO_LARGE)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)  # type: ignore[untyped-decorator]
def decode_pieces(  # type: ignore[no-untyped-def]
    bases, strides, blocks, slots, slot_stride, layers, rows, pieces, count, tokens, head_step, token_step,
    FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
    BITS: tl.constexpr, SIGNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    LEVELS: tl.constexpr = _LEVELS4 if BITS == 4 else _LEVELS3
    signs = _signs(SIGNS, WIDTH)
    column = tl.arange(0, WIDTH // 2)[None, :]
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        place, layer, kind, row = rows_of_piece(piece, layers, rows, PIECE_ROWS)
        slot = slots + tl.load(blocks + place).to(tl.int64) * slot_stride
        first = (kind * layers + layer) * rows
        inside = row < rows
        scale = tl.load(slot.to(tl.pointer_type(tl.int16)) + first + row, mask=inside, other=0)
        coded = slot + 4 * layers * rows + first.to(tl.int64) * (WIDTH * BITS // 8)
        source = tl.multiple_of(coded.to(tl.pointer_type(tl.uint8)), 16) + row[:, None] * (WIDTH * BITS // 8) + column
        packed = tl.load(source, mask=inside[:, None] & (column < WIDTH * BITS // 8), other=0)
        if BITS == 4:
            codes = _unpacked(packed.to(tl.int32), PIECE_ROWS, WIDTH, 4)
        else:
            low, rest = tl.split(tl.trans(tl.reshape(packed, (PIECE_ROWS, 2, WIDTH // 4)), (0, 2, 1)))
            high, _ = tl.split(tl.trans(tl.reshape(rest, (PIECE_ROWS, 2, WIDTH // 8)), (0, 2, 1)))
            codes = _unpacked(low.to(tl.int32), PIECE_ROWS, WIDTH, 2)
            codes |= _unpacked(high.to(tl.int32), PIECE_ROWS, WIDTH, 1) << 2

        number = codes & ((1 << (BITS - 1)) - 1)
        level = tl.where(number == 1, LEVELS[1], LEVELS[0])
        for k in tl.static_range(2, 1 << (BITS - 1)):
            level = tl.where(number == k, LEVELS[k], level)
        signed = level.to(tl.int32, bitcast=True) ^ ((codes >> (BITS - 1)) << 31)
        values = _turn(signed.to(tl.float32, bitcast=True), PIECE_ROWS, WIDTH, STAGES)
        factor = (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        values *= signs * factor[:, None]
        block = tl.load(bases + layer) + tl.load(blocks + count + place).to(tl.int64) * tl.load(strides + layer)
        write_rows(values, block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH)
