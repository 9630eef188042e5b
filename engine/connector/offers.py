"""What this engine offers to others: full blocks whose KV is computed, until vLLM gives them away."""

from array import array
from collections.abc import Sequence as Blocks

from engine.connector.sequence import Sequence
from transport.table.writer import TableWriter

NEVER = 1 << 60
"""As a sequence's `published`: what it computes is not offered."""


class Offers:
    """Keeps `table` true. It remembers in which step each block was given away last: an older step's content is not offered."""

    def __init__(self, table: TableWriter) -> None:
        self._table = table
        self._allocated = array("q", bytes(8 * table.layout.blocks))

    def end(self, blocks: list[int], step: int) -> None:
        """vLLM gave away `blocks` in `step`: what they held is offered no more."""
        if blocks:
            for block in blocks:
                self._allocated[block] = step
            self._table.count("evictions", self._table.invalidate(blocks))

    def end_all(self) -> None:
        """Withdraw everything."""
        self._table.count("evictions", self._table.clear())

    def unchanged(self, blocks: Blocks[int], step: int) -> bool:
        """Tell whether all `blocks` hold what they did when `step` was done."""
        return all(self._allocated[block] <= step for block in blocks)

    def publish(self, sequence: Sequence, full_blocks: int, step: int) -> None:
        """Offer the first `full_blocks` of a sequence, as far as `step` filled them and nobody else has them since."""
        first, last = sequence.published, min(full_blocks, len(sequence.block_ids))
        if last <= first:
            return
        keys = sequence.keys(last)
        last = min(last, len(keys))
        blocks, keys = sequence.block_ids[first:last], keys[first:last]
        allocated = self._allocated
        if any(allocated[block] > step for block in blocks):  # given away while the step was under way
            places = [place for place, block in enumerate(blocks) if allocated[block] <= step]
            blocks, keys = [blocks[place] for place in places], keys[places]
        self._table.publish(blocks, keys)
        sequence.published = last
