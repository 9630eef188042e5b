"""The block tables of a simulated fleet, as the gateway and the importers read them: exact and never late."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class PublishedBlocks:
    """Which replica holds which block. A block's holders are the bits of one integer."""

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self._bytes = (replicas + 7) // 8
        self._holders: dict[int, int] = {}

    def publish(self, replica: int, blocks: Sequence[int]) -> None:
        """The step that filled these blocks is done."""
        bit, holders = 1 << replica, self._holders
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit

    def withdraw(self, replica: int, block: int) -> None:
        """The block is about to be overwritten there."""
        left = self._holders.get(block, 0) & ~(1 << replica)
        if left:
            self._holders[block] = left
        else:
            self._holders.pop(block, None)

    def run(self, replica: int, chain: Sequence[int], start: int = 0) -> int:
        """Return how many leading blocks of the chain the replica holds; the first `start` are assumed."""
        bit, holders = 1 << replica, self._holders
        for at in range(start, len(chain)):
            if not holders.get(chain[at], 0) & bit:
                return at
        return len(chain)

    def runs(self, chain: Sequence[int]) -> NDArray[np.int64]:
        """Return how many leading blocks of the chain each replica holds, shape (replicas,)."""
        held = np.zeros(self.replicas, dtype=np.int64)
        holders = self._holders
        alive = (1 << self.replicas) - 1
        for depth, block in enumerate(chain):
            still = alive & holders.get(block, 0)
            if still != alive:
                if depth:
                    held[self._members(alive & ~still)] = depth
                if not still:
                    return held
                alive = still
        held[self._members(alive)] = len(chain)
        return held

    def _members(self, mask: int) -> NDArray[np.bool_]:
        packed = np.frombuffer(mask.to_bytes(self._bytes, "little"), dtype=np.uint8)
        return np.unpackbits(packed, count=self.replicas, bitorder="little").astype(np.bool_)
