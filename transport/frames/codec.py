"""What a codec is: one contract, tested on each."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np

from transport.frames.shape import Bytes, Shape


class Quality(IntEnum):
    """The class of a decoded block: EXACT is bit for bit what was encoded. Nothing computed on a LOSSY one is exact either."""

    EXACT = 0
    LOSSY = 1


@dataclass(frozen=True, slots=True)
class Block:
    """A block to encode: `content` (shape.nbytes,) uint8, contiguous.

    `position` tokens of its sequence are known to come before it and `behind` after it: codecs may treat the first and the last
    of a sequence better.
    """

    shape: Shape
    content: Bytes
    position: int = 0
    behind: int = 0

    def __post_init__(self) -> None:
        if self.content.dtype != np.uint8 or self.content.shape != (self.shape.nbytes,) or not self.content.flags.c_contiguous:
            raise ValueError(f"a block of shape {self.content.shape} in place of {self.shape.nbytes} contiguous bytes")


class Codec(Protocol):
    """Turns blocks into payloads and back; without state of its own, so any number of threads may use it at once.

    `number` stands in frames: it never changes, and is never given to another codec.
    """

    @property
    def name(self) -> str: ...

    @property
    def number(self) -> int: ...

    @property
    def quality(self) -> Quality: ...

    def encode(self, block: Block) -> bytes | memoryview:
        """Return the payload, equal for equal blocks. Raises NotCoded for a block that this codec does not take."""

    def decode(self, payload: memoryview, shape: Shape, out: Bytes) -> None:
        """Write the block into `out` (shape.nbytes,). Raises FrameDamaged if the payload is not one of such a block.

        It reads nothing outside of the payload and allocates nothing by what the payload says.
        """
