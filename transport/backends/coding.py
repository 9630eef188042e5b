"""Blocks coded by int8 between a GPU and host memory, to the last bit as transport/frames/slot_codes.py has them.

One launch gathers, quantises and packs any list of blocks of all layers straight into slots, and one reads slots, restores and
scatters. As in `gather`, a few persistent programs loop over the blocks. A piece is what the keys, or the values, of a block
make in one layer, or a part of it: it lies side by side in the slot.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl

from transport.frames.rows import MAGNITUDE_MAX, SCALE_BYTES
from transport.frames.shape import Axis, Number, Shape

PIECE_NUMBERS_MAX = 16384
WIDTH_MIN, WIDTH_MAX = 32, 1024
ALIGNED_BYTES = 16
"""Addresses and strides are multiples of it, so that a thread reads and writes as much at once."""
_TOO_LARGE = tl.constexpr(int(np.float32(MAGNITUDE_MAX).view(np.uint32)))
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2 ** 23: added to a small number and taken off again, it rounds that to a whole one, ties to even."""
_FLOAT16_MAX = tl.constexpr(65504.0)


@dataclass(frozen=True, slots=True)
class Rows:
    """A block of `layers` layers, each with a key of `width` numbers, bfloat16 or float16, and a value for each head and token.

    From one head to the next they are `head_step` pairs apart in memory, from one token to the next `token_step`.
    """

    layers: int
    heads: int
    tokens: int
    width: int
    float16: bool
    head_step: int
    token_step: int

    @property
    def rows(self) -> int:
        """Keys of a layer."""
        return self.heads * self.tokens

    @property
    def piece_rows(self) -> int:
        """Rows of a piece, a power of two."""
        return int(min(triton.next_power_of_2(self.rows), PIECE_NUMBERS_MAX // self.width))

    def pieces(self, blocks: int) -> int:
        """Pieces of so many blocks."""
        return blocks * self.layers * 2 * -(-self.rows // self.piece_rows)


def rows_of(shape: Shape) -> Rows | None:
    """Return what the kernels have to know of blocks of this shape; None if they do not take them."""
    if len(shape.runs) != 1 or len(shape.runs[0].parts) != 1:
        return None
    part = shape.runs[0].parts[0]
    kinds, width = tuple(kind for kind, _ in part.axes), part.count(Axis.DIM)
    by_head = kinds == (Axis.OTHER, Axis.TOKEN, Axis.KV, Axis.DIM)
    by_token = kinds == (Axis.TOKEN, Axis.OTHER, Axis.KV, Axis.DIM)
    if not (by_head or by_token) or width & (width - 1) or not WIDTH_MIN <= width <= WIDTH_MAX:
        return None
    heads, tokens = part.count(Axis.OTHER), part.count(Axis.TOKEN)
    if part.number not in (Number.BFLOAT16, Number.FLOAT16) or heads * tokens * SCALE_BYTES % ALIGNED_BYTES:
        return None
    steps = (tokens, 1) if by_head else (1, heads)
    return Rows(shape.runs[0].count, heads, tokens, width, part.number is Number.FLOAT16, *steps)


# one compilation serves every copy: neither the number of blocks nor where they are may make a new one
_VARYING = ["bases", "strides", "blocks", "unfit", "slots", "slot_stride", "layers", "rows", "pieces", "count"]
_VARYING += ["tokens", "head_step", "token_step"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING)  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def]
    bases, strides, blocks, unfit, slots, slot_stride, layers, rows, pieces,
    count, tokens, head_step, token_step, FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
):  # fmt: skip
    chunks = (rows + PIECE_ROWS - 1) // PIECE_ROWS
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        kind = (piece // chunks) % 2
        layer = piece // (chunks * 2) % layers
        place = piece // (chunks * 2 * layers)
        row = (piece % chunks) * PIECE_ROWS + tl.arange(0, PIECE_ROWS)
        inside = row < rows
        mask = inside[:, None]
        column = tl.arange(0, WIDTH)[None, :]

        block = tl.load(bases + layer) + tl.load(blocks + place).to(tl.int64) * tl.load(strides + layer)
        pair = row // tokens * head_step + row % tokens * token_step
        source = (pair[:, None] * 2 + kind) * WIDTH + column
        if FLOAT16:
            values = tl.load(tl.multiple_of(block.to(tl.pointer_type(tl.float16)), 16) + source, mask=mask, other=0.0)
            values = values.to(tl.float32)
        else:
            bits = tl.load(tl.multiple_of(block.to(tl.pointer_type(tl.int16)), 16) + source, mask=mask, other=0)
            values = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)

        top = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        least = tl.div_rn(top.to(tl.float32, bitcast=True), 127.0)
        scale = (least.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
        divisor = (scale << 16).to(tl.float32, bitcast=True)
        inverse = tl.where(divisor > 1e-37, tl.div_rn(1.0, divisor), 0.0)
        codes = ((values * inverse[:, None] + _ROUNDING) - _ROUNDING).to(tl.int8)

        slot = slots + tl.load(blocks + count + place).to(tl.int64) * slot_stride
        first = (kind * layers + layer) * rows
        tl.store(slot.to(tl.pointer_type(tl.int16)) + first + row, scale.to(tl.int16), mask=inside)
        coded = slot + 4 * layers * rows + first.to(tl.int64) * WIDTH
        tl.store(tl.multiple_of(coded.to(tl.pointer_type(tl.int8)), 16) + row[:, None] * WIDTH + column, codes, mask=mask)
        tl.store(unfit + place, 1, mask=tl.max(top, axis=0) > _TOO_LARGE)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING)  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def]
    bases, strides, blocks, slots, slot_stride, layers, rows, pieces,
    count, tokens, head_step, token_step, FLOAT16: tl.constexpr, WIDTH: tl.constexpr, PIECE_ROWS: tl.constexpr,
):  # fmt: skip
    chunks = (rows + PIECE_ROWS - 1) // PIECE_ROWS
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        kind = (piece // chunks) % 2
        layer = piece // (chunks * 2) % layers
        place = piece // (chunks * 2 * layers)
        row = (piece % chunks) * PIECE_ROWS + tl.arange(0, PIECE_ROWS)
        inside = row < rows
        mask = inside[:, None]
        column = tl.arange(0, WIDTH)[None, :]

        slot = slots + tl.load(blocks + place).to(tl.int64) * slot_stride
        first = (kind * layers + layer) * rows
        coded = slot + 4 * layers * rows + first.to(tl.int64) * WIDTH
        codes = tl.load(
            tl.multiple_of(coded.to(tl.pointer_type(tl.int8)), 16) + row[:, None] * WIDTH + column, mask=mask, other=0
        )
        scale = tl.load(slot.to(tl.pointer_type(tl.int16)) + first + row, mask=inside, other=0)
        values = codes.to(tl.float32) * (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)[:, None]

        block = tl.load(bases + layer) + tl.load(blocks + count + place).to(tl.int64) * tl.load(strides + layer)
        pair = row // tokens * head_step + row % tokens * token_step
        target = (pair[:, None] * 2 + kind) * WIDTH + column
        if FLOAT16:
            small = tl.minimum(tl.maximum(values, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)
            tl.store(tl.multiple_of(block.to(tl.pointer_type(tl.float16)), 16) + target, small, mask=mask)
        else:
            bits = values.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
            tl.store(tl.multiple_of(block.to(tl.pointer_type(tl.int16)), 16) + target, rounded, mask=mask)


def encode(layers: Any, slots: tuple[int, int], rows: Rows, blocks: Any, unfit: Any, programs: int) -> None:
    """Code blocks of the engine's into slots, on the current stream.

    `layers` is an address table as `gather` has it, `slots` the address and stride of slots; `blocks` is an int32 tensor
    (2, n): ids of blocks, of slots. `unfit` is an int32 tensor (n,) of zeros, pinned: 1 for each block that has numbers which
    cannot be coded, whose slot then holds nothing of use.
    """
    _launch(_encode, (layers[0], layers[1], blocks, unfit), slots, rows, blocks, programs)


def decode(slots: tuple[int, int], layers: Any, rows: Rows, blocks: Any, programs: int) -> None:
    """Restore blocks out of slots, on the current stream; `blocks`: ids of slots, of the engine's blocks. Else as `encode`."""
    _launch(_decode, (layers[0], layers[1], blocks), slots, rows, blocks, programs)


def _launch(kernel: Any, memory: tuple[Any, ...], slots: tuple[int, int], rows: Rows, blocks: Any, programs: int) -> None:
    pieces = rows.pieces(blocks.shape[1])
    numbers = rows.piece_rows * rows.width
    kernel[(max(1, min(programs, pieces)),)](
        *memory, *slots, rows.layers, rows.rows, pieces, blocks.stride(0), rows.tokens, rows.head_step, rows.token_step,
        FLOAT16=rows.float16, WIDTH=rows.width, PIECE_ROWS=rows.piece_rows,
        num_warps=max(1, min(8, numbers // 2048)), enable_fp_fusion=False,
    )  # fmt: skip
