"""The copy of an import on the GPU: one launch gathers any list of blocks of all layers out of a peer's memory.

A few persistent programs loop over the blocks, so that the engine's own kernels keep most of the GPU: one program a block
stalled a decode step six times over, 8 to 16 reach 295 to 368 of the link's 395 GB/s beside it (H200, NVLink, 2026-11-22).
"""

from typing import Any

import triton
import triton.language as tl

WORD_BYTES = 8
CHUNK_WORDS_MAX = 8192


# one compilation serves every import: neither the number of blocks nor the alignment of their ids may make a new one
_VARYING = ["source_blocks", "target_blocks", "count", "layers", "chunks"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_VARYING)  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    source_bases,
    target_bases,
    source_strides,
    target_strides,
    layer_words,
    source_blocks,
    target_blocks,
    count,
    layers,
    chunks,
    CHUNK_WORDS: tl.constexpr,
):
    lanes = tl.arange(0, CHUNK_WORDS)
    for piece in range(tl.program_id(0), layers * count * chunks, tl.num_programs(0)):
        chunk = piece % chunks
        place = (piece // chunks) % count
        layer = piece // (chunks * count)
        source = tl.load(source_bases + layer) + tl.load(source_blocks + place).to(tl.int64) * tl.load(source_strides + layer)
        target = tl.load(target_bases + layer) + tl.load(target_blocks + place).to(tl.int64) * tl.load(target_strides + layer)
        words = chunk * CHUNK_WORDS + lanes
        inside = words < tl.load(layer_words + layer)
        data = tl.load(source.to(tl.pointer_type(tl.int64)) + words, mask=inside)
        tl.store(target.to(tl.pointer_type(tl.int64)) + words, data, mask=inside)


def gather(source: Any, target: Any, blocks: Any, words_max: int, programs: int) -> None:
    """Copy blocks between the memories that two address tables describe, on the current stream.

    `source` and `target` are int64 tensors (3, layers) on the importer's device: address of block 0, stride in bytes, words
    of WORD_BYTES in a block. `blocks` is an int32 tensor (2, n): source ids, target ids. `words_max` is the largest third row.
    """
    chunk = min(CHUNK_WORDS_MAX, triton.next_power_of_2(words_max))
    chunks = triton.cdiv(words_max, chunk)
    count, layers = blocks.shape[1], target.shape[1]
    _gather[(min(programs, layers * count * chunks),)](
        source[0], target[0], source[1], target[1], target[2], blocks[0], blocks[1], count, layers, chunks,
        CHUNK_WORDS=chunk, num_warps=max(1, min(16, chunk // 512)),
    )  # fmt: skip
