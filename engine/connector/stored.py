"""Which blocks go into host memory: those that vLLM reallocates, and, so that they are there by then, the next in its queue."""

from collections.abc import Sequence as Blocks
from typing import Any

from engine.connector.import_sources import Peers
from engine.connector.offers import Offers
from engine.tiers.host_memory import HostMemory
from engine.tiers.stores import Stores
from transport.table.kept_table import KeptTable
from transport.table.writer import TableWriter

AHEAD_BLOCKS = 64
"""Blocks at the head of vLLM's queue of free ones that are stored before it reallocates them."""


class Stored:
    """The tier of the engine that owns `table`, whose workers are `ranks`; its blocks are offered in `tier`."""

    def __init__(self, table: TableWriter, tier: KeptTable, sources: Peers, *, ranks: int) -> None:
        self._table = table
        self._memory = HostMemory(tier, ranks=ranks, elsewhere=sources.stored_elsewhere)
        self._moved = False
        self.offers: Offers | None = None
        """Set once, as the two know each other."""

    @property
    def name(self) -> str:
        """The name under which its blocks are imported."""
        return self._memory.name

    def leaving(self, blocks: Blocks[int]) -> None:
        """vLLM reallocated `blocks`, in the step that is being made: what is on offer of them is stored before that."""
        self._take(blocks)
        self._memory.overwritten(blocks)
        self._moved = True

    def close_step(self, pool: Any) -> Stores:
        """Return what the workers have to store in a step, with what `pool` will reallocate next."""
        if self._moved and pool is not None:
            self._moved = False
            self._take(_next_free(pool))
        return self._memory.take_stores()

    def copied(self, slots: dict[int, int]) -> None:
        """So many workers have filled these slots."""
        if slots:
            self._memory.copied(slots)

    def restored(self, slots: Blocks[int]) -> None:
        """These slots are being read."""
        self._memory.restored(slots)

    def clear(self) -> None:
        """Give up all that is stored."""
        self._memory.clear()

    def _take(self, blocks: Blocks[int]) -> None:
        held, keys = self._table.offered(blocks)
        if held and self.offers is not None:
            self._memory.take(held, keys, self.offers.groups(held))


def _next_free(pool: Any) -> list[int]:
    """Return the blocks that vLLM's pool will reallocate next, as far as they hold something that can be used again."""
    found: list[int] = []
    block = pool.free_block_queue.fake_free_list_head.next_free_block
    while block is not None and block.block_id >= 0 and len(found) < AHEAD_BLOCKS:
        found.append(block.block_id)
        block = block.next_free_block
    return found
