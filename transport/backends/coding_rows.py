"""What the kernels that code have in common: which rows a piece is, and how these are read from blocks and written to them.

A piece is what the keys, or the values, of a block make in one layer, or a part of it: `PIECE_ROWS` rows, a power of two.
"""

import triton
import triton.language as tl

VARYING = ["bases", "strides", "blocks", "unfit", "slots", "slot_stride", "layers", "rows", "pieces", "count"]
VARYING += ["tokens", "head_step", "token_step"]
"""Arguments of the kernels: one compilation serves every copy, whatever the number of blocks and wherever they are."""

_FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit  # type: ignore[untyped-decorator]
def rows_of_piece(piece, layers, rows, PIECE_ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a piece's block among those of the launch, its layer, 0 for keys or 1 for values, and its rows (PIECE_ROWS,)."""
    chunks = (rows + PIECE_ROWS - 1) // PIECE_ROWS
    kind = (piece // chunks) % 2
    layer = piece // (chunks * 2) % layers
    place = piece // (chunks * 2 * layers)
    return place, layer, kind, (piece % chunks) * PIECE_ROWS + tl.arange(0, PIECE_ROWS)


@triton.jit  # type: ignore[untyped-decorator]
def read_rows(  # type: ignore[no-untyped-def]
    block, row, rows, kind, tokens, head_step, token_step, FLOAT16: tl.constexpr, WIDTH: tl.constexpr,
    FIRST: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return columns from `FIRST` on of rows of the block at an address, float32 (PIECE_ROWS, COLUMNS): zeros past its end."""
    pair = row // tokens * head_step + row % tokens * token_step
    source = (pair[:, None] * 2 + kind) * WIDTH + FIRST + tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows)[:, None]
    if FLOAT16:
        values = tl.load(tl.multiple_of(block.to(tl.pointer_type(tl.float16)), 16) + source, mask=mask, other=0.0)
        values = values.to(tl.float32)
    else:
        bits = tl.load(tl.multiple_of(block.to(tl.pointer_type(tl.int16)), 16) + source, mask=mask, other=0)
        values = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def write_rows(  # type: ignore[no-untyped-def]
    values, block, row, rows, kind, tokens, head_step, token_step, FLOAT16: tl.constexpr, WIDTH: tl.constexpr
):
    """Write float32 (PIECE_ROWS, WIDTH) to rows of the block at an address, rounded to nearest, ties to even."""
    pair = row // tokens * head_step + row % tokens * token_step
    target = (pair[:, None] * 2 + kind) * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (row < rows)[:, None]
    if FLOAT16:
        small = tl.minimum(tl.maximum(values, -_FLOAT16_MAX), _FLOAT16_MAX).to(tl.float16)
        tl.store(tl.multiple_of(block.to(tl.pointer_type(tl.float16)), 16) + target, small, mask=mask)
    else:
        bits = values.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
        tl.store(tl.multiple_of(block.to(tl.pointer_type(tl.int16)), 16) + target, rounded, mask=mask)
