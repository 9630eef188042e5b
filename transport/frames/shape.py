"""What lies in a block: its layers side by side, each made of parts whose numbers stand in a certain order.

A block of a KV cache group is `Run`s one after the other, a run a number of equal cells (a layer, or a head of one), a cell
`Part`s. The axes of a part are in memory order, outermost first. A kind of axis may come several times: keys in tiles of 16
tokens, each with its dimensions outermost, have the axes token / 16, dim, token 16. A codec works on rows, the numbers that one
head keeps for one token, so it brings a part into the order (others, token, dim) and back.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from transport.frames.errors import FrameDamaged

RUNS_MAX, PARTS_MAX, AXES_MAX = 64, 8, 8
BLOCK_BYTES_MAX = 1 << 32
Bytes = npt.NDArray[np.uint8]
_RUN, _PART, _AXIS = struct.Struct("<IB"), struct.Struct("<BBB"), struct.Struct("<BI")


class Number(IntEnum):
    """How a number is stored; `BYTES` is anything else (a quantised cache, say), which only lossless codecs take."""

    BYTES = 0
    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT32 = 3

    @property
    def nbytes(self) -> int:
        """Bytes of one."""
        return (1, 2, 2, 4)[self]


class Role(IntEnum):
    """What a part is to attention. In `PAIRS` an axis `KV` of 2 tells keys from values; `STATE` is never coded with loss."""

    STATE = 0
    KEYS = 1
    VALUES = 2
    PAIRS = 3
    LATENT = 4


class Axis(IntEnum):
    """What an axis counts: tokens, the numbers of a row, keys and values, or anything else (heads, layers)."""

    OTHER = 0
    TOKEN = 1
    DIM = 2
    KV = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One array. Raises ValueError for axes that cannot be."""

    role: Role
    number: Number
    axes: tuple[tuple[Axis, int], ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.axes) <= AXES_MAX or any(size < 1 for _, size in self.axes):
            raise ValueError(f"a part with axes {self.axes}")
        if (self.count(Axis.KV) == 2) != (self.role is Role.PAIRS) or sum(kind is Axis.KV for kind, _ in self.axes) > 1:
            raise ValueError(f"a part {self.role.name} with axes {self.axes}: PAIRS have one axis KV of 2, others none")

    def count(self, kind: Axis) -> int:
        """Return the product of the sizes of a kind of axis: 1 if there is none."""
        return math.prod(size for axis, size in self.axes if axis is kind)

    @property
    def nbytes(self) -> int:
        """Bytes of the part in one cell."""
        return math.prod(size for _, size in self.axes) * self.number.nbytes


@dataclass(frozen=True, slots=True)
class Run:
    """`count` equal cells, one after the other."""

    count: int
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 < len(self.parts) <= PARTS_MAX:
            raise ValueError(f"a run of {self.count} cells with {len(self.parts)} parts")

    @property
    def cell_bytes(self) -> int:
        """Bytes of one cell."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Shape:
    """What lies in every block of a KV cache group on one rank. `tokens` is the block size: 1 for a block of states.

    Raises ValueError for more than a frame holds, and if parts disagree about the tokens.
    """

    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        counted = {part.count(Axis.TOKEN) for run in self.runs for part in run.parts}
        if not 0 < len(self.runs) <= RUNS_MAX or self.nbytes > BLOCK_BYTES_MAX or len(counted) != 1:
            raise ValueError(f"a block of {len(self.runs)} runs, {self.nbytes} bytes and {sorted(counted)} tokens")

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return sum(run.count * run.cell_bytes for run in self.runs)

    @cached_property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.runs[0].parts[0].count(Axis.TOKEN)

    @cached_property
    def packed(self) -> bytes:
        """The shape as a frame has it."""
        words = []
        for run in self.runs:
            words.append(_RUN.pack(run.count, len(run.parts)))
            for part in run.parts:
                words.append(_PART.pack(part.role, part.number, len(part.axes)))
                words += [_AXIS.pack(kind, size) for kind, size in part.axes]
        return b"".join(words)

    def pieces(self, content: Bytes) -> Iterator[tuple[Part, Bytes]]:
        """Yield every part with its place in `content` (bytes,), shape (cells, bytes of the part): views."""
        begin = 0
        for run in self.runs:
            cells = content[begin : begin + run.count * run.cell_bytes].reshape(run.count, run.cell_bytes)
            begin += cells.size
            place = 0
            for part in run.parts:
                yield part, cells[:, place : place + part.nbytes]
                place += part.nbytes


def unpacked(data: bytes) -> Shape:
    """Return the shape that `Shape.packed` wrote. Raises FrameDamaged for anything else."""
    try:
        runs: list[Run] = []
        place = 0
        while place < len(data):
            if len(runs) == RUNS_MAX:
                raise FrameDamaged("a frame with too many runs of layers")
            (count, parts), place = _RUN.unpack_from(data, place), place + _RUN.size
            read = []
            for _ in range(parts):
                (role, number, axes), place = _PART.unpack_from(data, place), place + _PART.size
                found = [_AXIS.unpack_from(data, place + _AXIS.size * each) for each in range(min(axes, AXES_MAX + 1))]
                place += _AXIS.size * axes
                read.append(Part(Role(role), Number(number), tuple((Axis(kind), size) for kind, size in found)))
            runs.append(Run(count, tuple(read)))
        return Shape(tuple(runs))
    except (struct.error, ValueError) as error:
        raise FrameDamaged(f"a frame with a shape that cannot be: {error}") from error


_STORED: dict[Number, Any] = {
    Number.BYTES: np.uint8,
    Number.BFLOAT16: np.uint16,
    Number.FLOAT16: np.float16,
    Number.FLOAT32: np.uint32,
}


def by_token(part: Part, piece: Bytes) -> npt.NDArray[Any]:
    """View a part of all cells (cells, bytes) as numbers (…, tokens…, dims…): others, then tokens, then dims; bit patterns.

    float16 comes as itself, bfloat16 as uint16 and float32 as uint32.
    """
    stored = piece.view(_STORED[part.number]).reshape(piece.shape[0], *(size for _, size in part.axes))
    ordered: npt.NDArray[Any] = stored.transpose(_order(part))
    return ordered


@lru_cache(maxsize=256)
def _order(part: Part) -> tuple[int, ...]:
    """The axes of a part of all cells, keys and values outermost, then cells and others, tokens, dims."""
    ranks = {Axis.KV: 0, Axis.OTHER: 1, Axis.TOKEN: 2, Axis.DIM: 3}
    kinds = [Axis.OTHER, *(kind for kind, _ in part.axes)]
    return tuple(sorted(range(len(kinds)), key=lambda axis: ranks[kinds[axis]]))
