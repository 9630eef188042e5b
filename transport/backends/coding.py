"""Blocks coded between a GPU and host memory, to the last bit as transport/frames/slot_codes.py has them.

One launch gathers, codes and packs any list of blocks of all layers straight into slots, and one reads slots, restores and
scatters. As in `gather`, a few persistent programs loop over the blocks, piece by piece (coding_rows): what a piece makes lies
side by side in the slot.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton

from transport.backends import coding_int8, coding_rotated
from transport.frames.rows import SCALE_BYTES, signs
from transport.frames.shape import Axis, Number, Shape
from transport.table.layout import SlotCodec

WIDTH_MIN, WIDTH_MAX = 32, 1024
ALIGNED_BYTES = 16
"""Addresses and strides are multiples of it, so that a thread reads and writes as much at once."""
WARPS_MAX = 8


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

    def coded_bytes(self, codec: SlotCodec) -> int:
        """Bytes of a coded block."""
        return 2 * self.layers * self.rows * (SCALE_BYTES + self.width * _BITS[codec] // 8)


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


def encode(codec: SlotCodec, layers: Any, slots: tuple[int, int], rows: Rows, blocks: Any, unfit: Any, programs: int) -> None:
    """Code blocks of the engine's into slots, on the current stream.

    `layers` is an address table as `gather` has it, `slots` the address and stride of slots; `blocks` is an int32 tensor
    (2, n): ids of blocks, of slots. `unfit` is an int32 tensor (n,) of zeros, pinned: 1 for each block that has numbers which
    cannot be coded, whose slot then holds nothing of use.
    """
    kernel = _KERNELS[codec].encode_pieces
    _launch(kernel, codec, (layers[0], layers[1], blocks, unfit), slots, rows, blocks, programs)


def decode(codec: SlotCodec, slots: tuple[int, int], layers: Any, rows: Rows, blocks: Any, programs: int) -> None:
    """Restore blocks out of slots, on the current stream; `blocks`: ids of slots, of the engine's blocks. Else as `encode`."""
    kernel = _KERNELS[codec].decode_pieces
    _launch(kernel, codec, (layers[0], layers[1], blocks), slots, rows, blocks, programs)


_KERNELS: dict[SlotCodec, Any] = {"int8": coding_int8, "rot4": coding_rotated, "rot3": coding_rotated}
_BITS: dict[SlotCodec, int] = {"int8": 8, "rot4": 4, "rot3": 3}


def _launch(
    kernel: Any, codec: SlotCodec, memory: tuple[Any, ...], slots: tuple[int, int], rows: Rows, blocks: Any, programs: int
) -> None:
    module = _KERNELS[codec]
    piece_rows = min(triton.next_power_of_2(rows.rows), module.PIECE_NUMBERS_MAX // rows.width)
    pieces = blocks.shape[1] * rows.layers * 2 * -(-rows.rows // piece_rows)
    kernel[(max(1, min(programs, pieces)),)](
        *memory, *slots, rows.layers, rows.rows, pieces, blocks.stride(0), rows.tokens, rows.head_step, rows.token_step,
        FLOAT16=rows.float16, WIDTH=rows.width, PIECE_ROWS=piece_rows, **_constants(codec, rows.width),
        num_warps=max(1, min(WARPS_MAX, piece_rows * rows.width // module.WARP_NUMBERS)), enable_fp_fusion=False,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _constants(codec: SlotCodec, width: int) -> dict[str, int]:
    """Return what the kernels of a codec are compiled for beside the shape of its rows."""
    if codec == "int8":
        return {}
    negative = sum(1 << column for column, sign in enumerate(signs(width)) if sign < 0)
    return {"BITS": _BITS[codec], "SIGNS": negative, "STAGES": width.bit_length() - 1}
