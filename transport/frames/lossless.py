"""`raw` and `raw-z`: what comes out is what went in, bit for bit.

`raw-z` turns numbers so that their exponents fill bytes of their own, the sign going last, puts the first bytes of all numbers
of a run together, then the second ones (byte planes), and compresses that with zstd: exponents repeat, mantissas hardly do.
"""

from typing import Any, ClassVar

import numpy as np
import zstandard

from transport.frames.codec import Block, Quality
from transport.frames.errors import FrameDamaged
from transport.frames.shape import Bytes, Number, Run, Shape

ZSTD_LEVEL = 1
ZSTD_WINDOW_MAX = 8 << 20
_WORDS: dict[int, Any] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Raw:
    """The bytes themselves."""

    name: ClassVar[str] = "raw"
    number: ClassVar[int] = 0
    quality: ClassVar[Quality] = Quality.EXACT

    def encode(self, block: Block) -> memoryview:
        return block.content.data

    def decode(self, payload: memoryview, shape: Shape, out: Bytes) -> None:
        if len(payload) != shape.nbytes:
            raise FrameDamaged(f"{len(payload)} bytes in place of {shape.nbytes}")
        out[:] = np.frombuffer(payload, np.uint8)


class RawZ:
    """Byte planes and zstd."""

    name: ClassVar[str] = "raw-z"
    number: ClassVar[int] = 1
    quality: ClassVar[Quality] = Quality.EXACT

    def encode(self, block: Block) -> bytes:
        planes = np.empty(block.shape.nbytes, np.uint8)
        begin = 0
        for run in block.shape.runs:
            end = begin + run.count * run.cell_bytes
            _split(block.content[begin:end], _item_bytes(run), planes[begin:end])
            begin = end
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(planes.data)

    def decode(self, payload: memoryview, shape: Shape, out: Bytes) -> None:
        planes = np.empty(shape.nbytes, np.uint8)
        _decompress(payload, planes)
        begin = 0
        for run in shape.runs:
            end = begin + run.count * run.cell_bytes
            _join(planes[begin:end], _item_bytes(run), out[begin:end])
            begin = end


def _decompress(payload: memoryview, into: Bytes) -> None:
    """Fill `into` exactly. Raises FrameDamaged."""
    target, filled = into.data, 0
    reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX).stream_reader(payload)
    try:
        while filled < len(target) and (count := reader.readinto(target[filled:])):
            filled += count
        ended = not reader.read(1)
    except zstandard.ZstdError as error:
        raise FrameDamaged(f"zstd: {error}") from error
    if filled != len(target) or not ended:
        raise FrameDamaged(f"{filled} bytes decompressed, or more, in place of {len(target)}")


def _item_bytes(run: Run) -> int:
    """Bytes of each number in a run; 1 if there are several kinds of them."""
    numbers = {part.number for part in run.parts}
    return numbers.pop().nbytes if len(numbers) == 1 and Number.BYTES not in numbers else 1


def _split(content: Bytes, item: int, planes: Bytes) -> None:
    if item == 1:
        planes[:] = content
        return
    words = content.view(_WORDS[item])
    words = words << 1 | words >> (8 * item - 1)
    for plane in range(item):
        np.copyto(planes.reshape(item, -1)[plane], words >> 8 * plane, casting="unsafe")


def _join(planes: Bytes, item: int, content: Bytes) -> None:
    if item == 1:
        content[:] = planes
        return
    words = np.zeros(content.size // item, _WORDS[item])
    for plane in range(item):
        words |= planes.reshape(item, -1)[plane].astype(words.dtype) << 8 * plane
    content.view(_WORDS[item])[:] = words >> 1 | words << (8 * item - 1)
