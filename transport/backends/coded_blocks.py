"""Blocks of host memory that lie coded, as a core reads them: decoded, and put where their layers are."""

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transport.errors import MemoryUnreachable
from transport.frames.errors import FrameError
from transport.frames.shape import Bytes, Shape, unpacked
from transport.table.layout import CHECKSUM_BYTES, Coded


def shape_of(coded: Coded, block_bytes: int) -> Shape:
    """Return the shape of blocks of which some are coded. Raises MemoryUnreachable if it is not of such a size."""
    try:
        shape = unpacked(bytes.fromhex(coded.shape))
    except (ValueError, FrameError) as error:
        raise MemoryUnreachable(f"a shape of blocks that cannot be: {error}") from error
    if shape.nbytes != block_bytes:
        raise MemoryUnreachable(f"coded blocks of {shape.nbytes} bytes in place of {block_bytes}")
    return shape


@dataclass(frozen=True, slots=True)
class CodedBlocks:
    """Those of a mapped region, which have checksums if they are `checked`; those that GPUs stored have none.

    Raises MemoryUnreachable if `blocks` of them do not lie within it.
    """

    coded: Coded
    shape: Shape
    memory: mmap.mmap
    blocks: int
    checked: bool = True

    def __post_init__(self) -> None:
        coded = self.coded
        taken = coded.checksum + CHECKSUM_BYTES if self.checked else coded.bytes
        end = coded.offset + (self.blocks - 1) * coded.stride + taken
        within = 0 < coded.bytes <= (coded.checksum if self.checked else coded.stride) <= coded.stride
        if coded.offset < 0 or not within or end > len(self.memory):
            raise MemoryUnreachable("a description of coded blocks that do not fit their memory")

    def read(self, block: int) -> tuple[Bytes, bytes]:
        """Return a coded block and the checksum that is stored with it, b"" if none is."""
        begin = self.coded.offset + block * self.coded.stride
        said = begin + self.coded.checksum
        code = np.frombuffer(self.memory, np.uint8, self.coded.bytes, begin).copy()
        if not self.checked:
            return code, b""
        return code, self.memory[said : said + CHECKSUM_BYTES]

    def decoded(self, code: Bytes) -> Bytes:
        """Return a block, its layers side by side."""
        from transport.frames.slot_codes import decode  # it needs numba

        content = np.empty(self.shape.nbytes, np.uint8)
        decode(self.coded.codec, code, self.shape, content)
        return content


def put(content: Bytes, block: int, layers: Sequence[tuple[int, int]], sizes: Sequence[int]) -> None:
    """Write a block whose layers lie side by side to where they belong: of each address of block 0, stride and bytes."""
    begin: int = content.__array_interface__["data"][0]
    for (address, stride), size in zip(layers, sizes, strict=True):
        ctypes.memmove(address + block * stride, begin, size)
        begin += size
