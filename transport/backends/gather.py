"""The copy of an import on the GPU: one launch gathers any list of blocks of all layers out of a peer's memory.

A few persistent programs loop over the blocks, so that the engine's own kernels keep most of the GPU: one program a block
stalled a decode step six times over, 8 to 16 reach 295 to 368 of the link's 395 GB/s beside it (H200, NVLink, 2026-11-22).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

WORD_BYTES = 8
CHUNK_WORDS_MAX = 8192
_ROW = tl.constexpr(5)
"""Numbers in a row of the plan: the segment's first piece, its first layer, its first place, its blocks, chunks in a block."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Layers of one KV cache group whose blocks have the same size: neighbours in the address tables, `words` in a block."""

    group: int
    first_layer: int
    layers: int
    words: int


def segments_of(layers: Sequence[tuple[int, int]]) -> tuple[Segment, ...]:
    """Return the segments of layers, each told by its group and the bytes of its blocks, in the order of the address tables."""
    found: list[Segment] = []
    for (group, size), same in itertools.groupby(layers):
        first = found[-1].first_layer + found[-1].layers if found else 0
        found.append(Segment(group, first, len(list(same)), size // WORD_BYTES))
    return tuple(found)


def plan(segments: Sequence[Segment], groups: Sequence[slice]) -> tuple[npt.NDArray[np.int32], int]:
    """Return the plan of a launch, int32 (segments, 5), and its number of pieces; `groups` says where each's blocks lie."""
    chunk, rows, pieces = _chunk(segments), [], 0
    for segment in segments:
        part = groups[segment.group]
        count, chunks = part.stop - part.start, -(-segment.words // chunk)
        rows.append((pieces, segment.first_layer, part.start, count, chunks))
        pieces += segment.layers * count * chunks
    return np.array(rows, np.int32), pieces


def _chunk(segments: Sequence[Segment]) -> int:
    return int(min(CHUNK_WORDS_MAX, triton.next_power_of_2(max(segment.words for segment in segments))))


# one compilation serves every import: neither the number of blocks nor the alignment of their ids may make a new one
_VARYING = ["plan", "source_blocks", "target_blocks", "pieces"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING)  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    source_bases,
    target_bases,
    source_strides,
    target_strides,
    layer_words,
    plan,
    source_blocks,
    target_blocks,
    pieces,
    SEGMENTS: tl.constexpr,
    CHUNK_WORDS: tl.constexpr,
):
    lanes = tl.arange(0, CHUNK_WORDS)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        row = plan
        for segment in tl.static_range(1, SEGMENTS):  # segments without pieces begin where the next one does
            row += (piece >= tl.load(plan + segment * _ROW)).to(tl.int32) * _ROW
        count = tl.load(row + 3)
        chunks = tl.load(row + 4)
        inner = piece - tl.load(row)
        place = tl.load(row + 2) + (inner // chunks) % count
        layer = tl.load(row + 1) + inner // (chunks * count)
        source = tl.load(source_bases + layer) + tl.load(source_blocks + place).to(tl.int64) * tl.load(source_strides + layer)
        target = tl.load(target_bases + layer) + tl.load(target_blocks + place).to(tl.int64) * tl.load(target_strides + layer)
        words = (inner % chunks) * CHUNK_WORDS + lanes
        inside = words < tl.load(layer_words + layer)
        data = tl.load(source.to(tl.pointer_type(tl.int64)) + words, mask=inside)
        tl.store(target.to(tl.pointer_type(tl.int64)) + words, data, mask=inside)


def gather(source: Any, target: Any, segments: Sequence[Segment], plan: Any, pieces: int, blocks: Any, programs: int) -> None:
    """Copy blocks between the memories that two address tables describe, on the current stream.

    `source` and `target` are int64 tensors (3, layers) on the importer's device: address of block 0, stride in bytes, words
    of WORD_BYTES in a block. `segments` are those of the layers, `plan` (on the device) and `pieces` what `plan` made of them;
    `blocks` is an int32 tensor (2, n): source ids, target ids.
    """
    if not pieces:
        return
    chunk = _chunk(segments)
    _gather[(min(programs, pieces),)](
        source[0], target[0], source[1], target[1], target[2], plan, blocks[0], blocks[1], pieces,
        SEGMENTS=len(segments), CHUNK_WORDS=chunk, num_warps=max(1, min(16, chunk // 512)),
    )  # fmt: skip
