"""`int8`, `rot4`, `rot3`, `mix` and `neurokv`: each is a choice of how every token's rows are coded.

A payload is a byte a token (`Level`), then, for each part of the block and each level that occurs, best first, the rows of its
tokens: bfloat16 scales, then codes, of each piece of a row (`rows`). It needs no other block and no calibration.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from transport.frames.codec import Block, Quality
from transport.frames.errors import FrameDamaged, NotCoded
from transport.frames.importance import key_scores
from transport.frames.rows import WIDTH_MULTIPLE, Level, coded_bytes, decode_rows, encode_rows
from transport.frames.shape import Axis, Bytes, Number, Part, Role, Shape, by_token

SINK_TOKENS = 4
"""First tokens of a sequence, which all later ones attend to: raw, they take a third off the divergence for 3 % of bytes."""
RECENT_TOKENS = 64
TOP_SHARE = 0.1
NEUROKV_FIRST, NEUROKV_LAST_SHARE, NEUROKV_HEAVY_SHARE = 1, 256 / 512, 96 / 512
"""What NeuroKV keeps of a prefix: its first token, its last half, the heaviest 96 of 512 (engine/quality/dropping.py)."""

Levels = npt.NDArray[np.uint8]
Choice = Callable[[Block], Levels]


class Lossy:
    """A codec whose `choice` says, for a block, each token's level (tokens,)."""

    quality: ClassVar[Quality] = Quality.LOSSY

    def __init__(self, name: str, number: int, choice: Choice) -> None:
        self.name = name
        self.number = number
        self._choice = choice

    def encode(self, block: Block) -> bytes:
        if reason := _unfit(block.shape):
            raise NotCoded(f"{reason}: store it with `raw-z`")
        levels = self._choice(block)
        coded = [levels.data]
        for part, piece in block.shape.pieces(block.content):
            numbers = by_token(part, piece)
            for level, chosen in _by_level(levels):
                rows = _flat(numbers, part)
                coded += encode_rows(_rows(rows if chosen is None else rows[:, chosen]), level)
        return b"".join(coded)

    def decode(self, payload: memoryview, shape: Shape, out: Bytes) -> None:
        if _unfit(shape):
            raise FrameDamaged(f"a frame of codec {self.name} with what that does not take")
        data = np.frombuffer(payload, np.uint8)
        levels = data[: shape.tokens]
        if len(levels) < shape.tokens or levels.max() > max(Level) or len(data) != _payload_bytes(shape, levels):
            raise FrameDamaged(f"a payload of {len(data)} bytes with other contents than its levels tell")
        place = shape.tokens
        for part, piece in shape.pieces(out):
            numbers = by_token(part, piece)
            shaped = (_others(part, len(piece)), shape.tokens, part.count(Axis.DIM))
            whole = numbers.reshape(shaped) if numbers.flags.c_contiguous else np.empty(shaped, numbers.dtype)
            for level, chosen in _by_level(levels):
                count = shape.tokens if chosen is None else len(chosen)
                end = place + coded_bytes(shaped[0] * count, shaped[2], part.number.nbytes, level)
                rows = whole if chosen is None else np.empty((shaped[0], count, shaped[2]), numbers.dtype)
                decode_rows(data[place:end], rows.reshape(-1, shaped[2]), level)
                if chosen is not None:
                    whole[:, chosen] = rows
                place = end
            if not numbers.flags.c_contiguous:
                numbers[...] = whole.reshape(numbers.shape)


def _unfit(shape: Shape) -> str:
    """Return why no lossy codec takes such blocks; "" if they do."""
    for run in shape.runs:
        for part in run.parts:
            if part.role is Role.STATE or part.number is Number.BYTES:
                return "a state, or a cache that is quantised already"
            if part.count(Axis.DIM) % WIDTH_MULTIPLE:
                return f"rows of {part.count(Axis.DIM)} numbers, no multiple of {WIDTH_MULTIPLE}"
    return ""


def _payload_bytes(shape: Shape, levels: Levels) -> int:
    total = shape.tokens
    for run in shape.runs:
        for part in run.parts:
            for level, chosen in _by_level(levels):
                rows = _others(part, run.count) * (shape.tokens if chosen is None else len(chosen))
                total += coded_bytes(rows, part.count(Axis.DIM), part.number.nbytes, level)
    return total


def _by_level(levels: Levels) -> Iterator[tuple[Level, npt.NDArray[np.intp] | None]]:
    """Yield each level that occurs, best first, with its tokens: None for all."""
    for level in np.unique(levels).tolist():
        chosen = np.flatnonzero(levels == level)
        yield Level(level), None if len(chosen) == len(levels) else chosen


def _others(part: Part, cells: int) -> int:
    return cells * math.prod(size for kind, size in part.axes if kind in (Axis.OTHER, Axis.KV))


def _flat(numbers: npt.NDArray[Any], part: Part) -> npt.NDArray[Any]:
    return numbers.reshape(-1, part.count(Axis.TOKEN), part.count(Axis.DIM))


def _rows(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.ascontiguousarray(numbers.reshape(-1, numbers.shape[-1]))


def _all(level: Level, sinks: int) -> Choice:
    """Every token alike, but for the first `sinks` of a sequence, which are raw."""

    def choice(block: Block) -> Levels:
        levels = np.full(block.shape.tokens, level, np.uint8)
        levels[: max(0, sinks - block.position)] = Level.RAW
        return levels

    return choice


def _by_importance(block: Block) -> Levels:
    """The first tokens raw; the last of a sequence, and in each block those whose keys stand out, int8; the rest 3 bits."""
    tokens = block.shape.tokens
    levels = np.full(tokens, Level.ROT3, np.uint8)
    top = max(1, round(tokens * TOP_SHARE))
    levels[np.argsort(-key_scores(block), kind="stable")[:top]] = Level.INT8
    recent = min(tokens, max(0, RECENT_TOKENS - block.behind))
    levels[tokens - recent :] = Level.INT8
    levels[: max(0, SINK_TOKENS - block.position)] = Level.RAW
    return levels


def _by_neurokv(block: Block) -> Levels:
    """What NeuroKV keeps int8, and 2 bits in place of what it drops; the heaviest by their keys, of what is not kept anyway.

    It goes by the sequence's length: tokens that are not known to come behind the block count for none.
    """
    tokens = block.shape.tokens
    levels = np.full(tokens, Level.ROT2, np.uint8)
    total = block.position + tokens + block.behind
    last = min(tokens, max(0, round(total * NEUROKV_LAST_SHARE) - block.behind))
    levels[tokens - last :] = Level.INT8
    levels[: max(0, NEUROKV_FIRST - block.position)] = Level.INT8
    others = np.flatnonzero(levels == Level.ROT2)
    heaviest = others[np.argsort(-key_scores(block)[others], kind="stable")]
    levels[heaviest[: round(tokens * NEUROKV_HEAVY_SHARE)]] = Level.INT8
    return levels


INT8 = Lossy("int8", 2, _all(Level.INT8, 0))
ROT4 = Lossy("rot4", 3, _all(Level.ROT4, SINK_TOKENS))
ROT3 = Lossy("rot3", 4, _all(Level.ROT3, SINK_TOKENS))
MIX = Lossy("mix", 5, _by_importance)
NEUROKV = Lossy("neurokv", 6, _by_neurokv)
