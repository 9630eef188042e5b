"""Kernels of int8: transport/frames/int8_kernels.py on a GPU."""

import numpy as np
import triton
import triton.language as tl

from transport.backends.coding_rows import VARYING, read_rows, rows_of_piece, write_rows
from transport.frames.rows import MAGNITUDE_MAX

PIECE_NUMBERS_MAX, WARP_NUMBERS = 16384, 2048
_TOO_LARGE = tl.constexpr(int(np.float32(MAGNITUDE_MAX).view(np.uint32)))
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: added to a small number and taken off again, it rounds that to a whole one, ties to even."""


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)  # type: ignore[untyped-decorator]
def encode_pieces(  # type: ignore[no-untyped-def]
    bases, strides, blocks, unfit, slots, slot_stride, layers, rows, pieces,
    count, tokens, head_step, token_step, FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        place, layer, kind, row = rows_of_piece(piece, layers, rows, PIECE_ROWS)
        inside = row < rows
        block = tl.load(bases + layer) + tl.load(blocks + place).to(tl.int64) * tl.load(strides + layer)
        values = read_rows(block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH, 0, WIDTH)

        top = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        least = tl.div_rn(top.to(tl.float32, bitcast=True), 127.0)
        scale = (least.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
        divisor = (scale << 16).to(tl.float32, bitcast=True)
        inverse = tl.where(divisor > 1e-37, tl.div_rn(1.0, divisor), 0.0)
        codes = ((values * inverse[:, None] + _ROUNDING) - _ROUNDING).to(tl.int8)

        slot = slots + tl.load(blocks + count + place).to(tl.int64) * slot_stride
        first = (kind * layers + layer) * rows
        tl.store(slot.to(tl.pointer_type(tl.int16)) + first + row, scale.to(tl.int16), mask=inside)
        coded = tl.multiple_of((slot + 4 * layers * rows + first.to(tl.int64) * WIDTH).to(tl.pointer_type(tl.int8)), 16)
        tl.store(coded + row[:, None] * WIDTH + column, codes, mask=inside[:, None])
        tl.store(unfit + place, 1, mask=tl.max(top, axis=0) > _TOO_LARGE)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=VARYING)  # type: ignore[untyped-decorator]
def decode_pieces(  # type: ignore[no-untyped-def]
    bases, strides, blocks, slots, slot_stride, layers, rows, pieces,
    count, tokens, head_step, token_step, FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        place, layer, kind, row = rows_of_piece(piece, layers, rows, PIECE_ROWS)
        inside = row < rows
        slot = slots + tl.load(blocks + place).to(tl.int64) * slot_stride
        first = (kind * layers + layer) * rows
        coded = tl.multiple_of((slot + 4 * layers * rows + first.to(tl.int64) * WIDTH).to(tl.pointer_type(tl.int8)), 16)
        codes = tl.load(coded + row[:, None] * WIDTH + column, mask=inside[:, None], other=0)
        scale = tl.load(slot.to(tl.pointer_type(tl.int16)) + first + row, mask=inside, other=0)
        values = codes.to(tl.float32) * (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)[:, None]

        block = tl.load(bases + layer) + tl.load(blocks + count + place).to(tl.int64) * tl.load(strides + layer)
        write_rows(values, block, row, rows, kind, tokens, head_step, token_step, FLOAT16, WIDTH)
