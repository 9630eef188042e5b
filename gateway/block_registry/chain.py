"""The keys of one prompt's full blocks, in the forms that every request needs."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

from transport.keys import KEY_BYTES, Keys, as_keys

_DEPTHS = [(2 << power) - 2 for power in range(32)]
_ANCHORS: list[Callable[[Any], Any]] = [itemgetter(slice(0)), itemgetter(slice(1))]
_ANCHORS += [itemgetter(*_DEPTHS[:powers]) for powers in range(2, len(_DEPTHS))]
"""By the number of anchors: extracts them from a chain's words."""


class Chain:
    """Keys of 16 bytes each, concatenated in `raw`; one per block. Immutable.

    `words` are the same as numbers of 8 bytes, two per key. `anchors` are the first words of the keys at depths 1, 2, 4 …,
    where prompts are compared: a key stands for everything before it, so two chains agree up to some block and nowhere after
    it.
    """

    __slots__ = ("anchors", "blocks", "raw", "words")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.blocks = len(raw) // KEY_BYTES
        self.words = memoryview(raw).cast("Q")
        self.anchors: tuple[int, ...] = tuple(_ANCHORS[self.blocks.bit_length()](self.words))

    @classmethod
    def of(cls, keys: Keys) -> Chain:
        """Return keys of shape (n, 2) in this form."""
        return cls(keys.tobytes())

    def __len__(self) -> int:
        return self.blocks

    @property
    def keys(self) -> Keys:
        """The keys as an array of shape (blocks, 2)."""
        return as_keys(self.raw)


EMPTY = Chain(b"")
