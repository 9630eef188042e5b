"""Prefixes that stay in an engine's KV cache although nobody uses them, for a bounded time and within a bounded share of it.

A pinned block has one more reference, taken and given back through vLLM's own `BlockPool.touch` and `free_blocks`: vLLM neither
reallocates it nor forgets its hash, and our table goes on offering it. Code without a clock: `now_ns` is CLOCK_MONOTONIC.

An idle engine makes no step, so a pin ends with the first step or arrival after its time: until then nobody wants the blocks.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transport.hint import PinWish

_logger = logging.getLogger(__name__)

PINS_MAX = 4096
DRY_STEPS_MAX = 4
"""Steps in a row without work, though there are requests: more than it takes until blocks come back that vLLM frees late."""
_NEVER = 1 << 63


class BlockPool(Protocol):
    """What is used of vLLM's block pool. The map is replaced when the prefix cache is reset."""

    cached_block_hash_to_block: Any
    blocks: Any

    def touch(self, blocks: Sequence[Any]) -> None: ...

    def free_blocks(self, ordered_blocks: Sequence[Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Pin:
    blocks: tuple[int, ...]
    until_ns: int


class Pins:
    """The pins of one engine: at most `blocks_max` different blocks and PINS_MAX pins. Scheduler's thread only."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._pool: BlockPool | None = None
        self._pins: dict[int, _Pin] = {}
        self._held: dict[int, int] = {}
        self._next_ns = _NEVER
        self._dry_steps = 0

    @property
    def blocks(self) -> int:
        """How many different blocks are pinned."""
        return len(self._held)

    def bind_pool(self, pool: BlockPool) -> None:
        """Set the pool that the blocks belong to. Without one every pin is refused."""
        self._pool = pool

    def take(self, wish: PinWish, blocks: Sequence[int], now_ns: int) -> bool:
        """Pin `blocks`, which hold what they should now, in place of what is pinned under the same number.

        False, and nothing changes, if there are none or they do not fit: what was pinned earlier is not given up for them.
        """
        former = self._pins.get(wish.id)
        wanted = dict.fromkeys(blocks)
        added = [block for block in wanted if block not in self._held]
        gone = sum(self._held[block] == 1 and block not in wanted for block in former.blocks) if former else 0
        full = former is None and len(self._pins) >= PINS_MAX
        if self._pool is None or not wanted or full or len(self._held) + len(added) - gone > self._blocks_max:
            return False
        self._pool.touch([self._pool.blocks[block] for block in added])
        for block in wanted:
            self._held[block] = self._held.get(block, 0) + 1
        until_ns = now_ns + int(wish.seconds * 1e9)
        self._pins[wish.id] = _Pin(tuple(wanted), until_ns)
        if former is not None:
            self._let_go([former])
        self._next_ns = min(self._next_ns, until_ns)
        return True

    def drop(self, ids: Sequence[int]) -> None:
        """Unpin by number; unknown numbers are ignored."""
        self._let_go([self._pins.pop(each) for each in ids if each in self._pins])

    def expire(self, now_ns: int) -> None:
        """Unpin everything whose time is up."""
        if now_ns >= self._next_ns:
            self.drop([each for each, pin in self._pins.items() if pin.until_ns <= now_ns])
            self._next_ns = min((pin.until_ns for pin in self._pins.values()), default=_NEVER)

    def clear(self) -> None:
        """Unpin everything."""
        self.drop(list(self._pins))
        self._next_ns = _NEVER

    def make_room(self, *, dry: bool) -> None:
        """Unpin everything after DRY_STEPS_MAX `dry` steps: vLLM had something to run and ran nothing, so it lacks blocks."""
        self._dry_steps = self._dry_steps + 1 if dry else 0
        if self._dry_steps >= DRY_STEPS_MAX and self._pins:
            _logger.warning("%d pinned blocks left no room for any request: all are unpinned", self.blocks)
            self.clear()

    def _let_go(self, pins: Sequence[_Pin]) -> None:
        """Give back each block that no pin holds any more; the end of a prefix comes first, as vLLM evicts it first."""
        free = []
        for pin in pins:
            for block in reversed(pin.blocks):
                count = self._held.pop(block) - 1
                if count:
                    self._held[block] = count
                else:
                    free.append(block)
        if free and self._pool is not None:
            self._pool.free_blocks([self._pool.blocks[block] for block in free])


def unpin_before_reset(pool: Any, unpin: Callable[[], None]) -> None:
    """Make `pool` call `unpin` before it resets its prefix cache.

    vLLM (0.32 and 0.33, v1/core/sched/scheduler.py, reset_prefix_cache) refuses a reset while any block has a reference, raises
    if it had preempted everybody for it, as on sleep and pause, and asks connectors only afterwards. So this one pool gets a
    method of its own in place of its class's. A reset that vLLM refuses all the same, since requests run, costs the pins too.
    """
    reset = pool.reset_prefix_cache

    def unpinned_reset() -> Any:
        unpin()
        return reset()

    pool.reset_prefix_cache = unpinned_reset
