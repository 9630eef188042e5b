"""Serves blocks whose owner's KV memory this process cannot read, a GPU's: out of the host memory of this node.

The same keys name the same blocks there. What is not there is stored first, by the engine that has it.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from transport.keys import Keys
from transport.node.block_copy import Chunk, OwnerMemory, copied_chunk, questioned, steps
from transport.node.messages import BlocksAsked, NodeError
from transport.table.quality import CODED, in_code
from transport.table.reader import TableReader

WANTED_SHARE = 2
"""A question has no more than one in so many of the blocks stored that host memory has room for: they would push out each other
otherwise. A long fetch is several questions."""
_ONE = np.uint64(1)
_CODED = np.uint64(CODED)

Missing = Callable[[], Sequence[int]]
"""Returns the owner's blocks that are still to be stored."""


class Storing(Protocol):
    """Has this node's engines store blocks of theirs in host memory."""

    def store(self, replica: str, missing: Missing) -> None:
        """Have `replica` store what is missing, until nothing is; within seconds, and not for sure.

        Raises NodeError if it does not do that.
        """


class StoredBlocks:
    """The blocks of `asked`, which are `owner`'s, in the host memories `tiers` of engines with its fingerprint.

    Raises NodeError if the question cannot be.
    """

    def __init__(self, owner: TableReader, tiers: Sequence[tuple[TableReader, OwnerMemory]], asked: BlocksAsked) -> None:
        self._tiers = tiers
        self._ids, states, self._counts = questioned(asked, owner.num_blocks)
        now, self._keys = owner.content(self._ids)
        good = (now == states) & (states & _ONE == 0)
        if owner.epoch != asked.epoch or not owner.alive():
            good[:] = False
        self._good: npt.NDArray[np.bool_] = good
        self._coded = states & _CODED
        self._most = max((_whole_blocks(tier) for tier, _ in tiers), default=0) // WANTED_SHARE

    def missing(self) -> list[int]:
        """Return which blocks of the owner's are in no host memory, the first ones first and no more than can be stored."""
        stored = np.zeros(len(self._ids), np.bool_)  # as the owner has them or coded, of which none is stored again
        for tier, _ in self._tiers:
            stored |= tier.look_up(self._keys)[0]
        missing: list[int] = self._ids[self._good & ~stored].tolist()
        return missing[: self._most]

    def chunks(self) -> Iterator[Chunk]:
        """Yield the blocks in their order, as `block_copy.chunks` does. Raises NodeError for a group that does not exist."""
        if not self._tiers:
            raise NodeError("there is no host memory")
        memory = self._tiers[0][1]
        for group, begin, end in steps(memory, self._counts):
            held, slots, states = self._look_up(slice(begin, end))
            content = np.zeros((end - begin, memory.block_bytes(group)), np.uint8)
            good = np.zeros(end - begin, np.bool_)
            for number, (tier, own) in enumerate(self._tiers):
                here = np.flatnonzero(held == number)
                if len(here):
                    part = copied_chunk(tier, own, tier.epoch, slots[here].astype(np.int64), states[here], group)
                    content[here], good[here] = part.content, part.good
            yield Chunk(content, good)

    def _look_up(self, part: slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
        """Return for each block in which of the tiers it is, -1 for none, in which slot and with which state."""
        keys: Keys = self._keys[part]
        held = np.full(len(keys), -1, np.int64)
        slots, states = np.zeros(len(keys), np.int32), np.zeros(len(keys), np.uint64)
        for number, (tier, _) in enumerate(self._tiers):
            found, ids, seen = tier.look_up(keys)
            # one that lies coded has lost what the owner's has not, and whoever asked would take it for the owner's
            found &= (held < 0) & self._good[part] & ~in_code(seen) & (seen & _CODED == self._coded[part])
            held[found], slots[found], states[found] = number, ids[found], seen[found]
        return held, slots, states


def _whole_blocks(tier: TableReader) -> int:
    """How many blocks that are not coded a tier has room for; beside coded ones each takes the room of several."""
    return tier.num_blocks // max((memory.coded.whole for memory in tier.memories if memory.coded is not None), default=1)
