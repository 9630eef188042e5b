"""Which blocks are stored in host memory before vLLM reallocates them, and when: those next in its queue of free ones.

Plain code without a clock. A step that reallocates blocks has the next ones stored, as another such step is likely to follow.
Further ahead is stored while nothing else uses the link: a few blocks at a time while requests only decode, and all at once
in the empty step that vLLM takes when its last request has ended, for an idle engine takes none. Those copies go on without
steps; that they ended is seen in the next one.
"""

from collections.abc import Sequence as Blocks
from enum import Enum, auto
from typing import Any

AHEAD_BLOCKS_MIN, AHEAD_BLOCKS_MAX = 64, 1024
"""Blocks at the head of the queue that are stored in a step that took some: twice as many as it took."""
FAR_BLOCKS_MAX = 4096
"""Blocks at the head of the queue that are stored in calm times: as many as a prompt of 64k tokens takes at once..."""
FAR_SHARE = 4
"""... but no more than this part of host memory, in which they are beside what is in no other place."""
CALM_STEPS, CALM_BLOCKS = 8, 128
"""So many blocks are stored in so many steps that only decode: 256 MiB of a model of 8B size, some 5 GB/s."""


class Pace(Enum):
    """What an engine does in a step: work on prompts or imports, decode alone, or nothing, and nothing is left to do."""

    BUSY = auto()
    CALM = auto()
    IDLE = auto()


class Ahead:
    """Chooses blocks for a tier of `slots`. It remembers which it chose, until vLLM reallocates them."""

    def __init__(self, slots: int) -> None:
        self._far = min(FAR_BLOCKS_MAX, slots // FAR_SHARE)
        self._chosen: set[int] = set()
        self._moved = 0
        self._calm_steps = 0
        self._left = True

    def moved(self, blocks: Blocks[int]) -> None:
        """vLLM reallocated `blocks`."""
        self._chosen.difference_update(blocks)
        self._moved += len(blocks)
        self._left = True

    def candidates(self, pool: Any, pace: Pace) -> tuple[list[int], int]:
        """Return blocks that were not chosen since they were reallocated, the next in the queue first, and how many to store of
        those that hold something; `chosen` is to be told which."""
        moved, self._moved = self._moved, 0
        depth = most = min(AHEAD_BLOCKS_MAX, max(AHEAD_BLOCKS_MIN, 2 * moved), self._far) if moved else 0
        self._calm_steps = self._calm_steps + 1 if pace is Pace.CALM else 0
        if pace is Pace.IDLE:
            depth = most = max(depth, self._far)
        elif self._calm_steps >= CALM_STEPS:
            self._calm_steps = 0
            if self._left:
                depth, most = self._far, CALM_BLOCKS
        if not depth:
            return [], 0
        self._left &= depth < self._far
        return [block for block in _next_free(pool, depth) if block not in self._chosen], most

    def chosen(self, blocks: Blocks[int], left: bool) -> None:
        """`blocks` are being stored; `left`: there were more than could be chosen."""
        self._chosen.update(blocks)
        self._left |= left

    def clear(self) -> None:
        """Nothing is stored any more."""
        self._chosen.clear()
        self._left = True


def _next_free(pool: Any, most: int) -> list[int]:
    """Return the blocks that vLLM's pool will reallocate next."""
    found: list[int] = []
    block = pool.free_block_queue.fake_free_list_head.next_free_block
    while block is not None and block.block_id >= 0 and len(found) < most:
        found.append(block.block_id)
        block = block.next_free_block
    return found
