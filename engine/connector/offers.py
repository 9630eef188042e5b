"""What this engine offers to others: full blocks whose KV is computed, until vLLM reallocates them."""

from array import array
from collections.abc import Callable, Set
from collections.abc import Sequence as Blocks

import numpy as np
import numpy.typing as npt

from engine.connector.sequence import NULL_BLOCK, Sequence
from engine.connector.vllm_groups import ModelGroups
from transport.int32 import int32_array
from transport.keys import Keys, group_keys
from transport.table.quality import CODED, LATER, LOSSY
from transport.table.writer import TableWriter

Leaving = Callable[[Blocks[int], bool], None]
Asked = Callable[[Keys], None]
NEVER = 1 << 60
"""As a sequence's `published`: what it computes is never offered."""
_CODED = np.uint64(CODED)


class Offers:
    """Keeps `table` truthful. It remembers in which step each block was last reallocated: older content is not offered.

    `leaving` is told of blocks before their offer ends because vLLM reallocated them, and whether an import will write them;
    `asked` of all keys of a sequence, whether their blocks are on offer already or not.
    """

    def __init__(
        self, table: TableWriter, groups: ModelGroups, leaving: Leaving | None = None, asked: Asked | None = None
    ) -> None:
        self._table = table
        self._groups = groups
        self._ratios = [
            (number, group.block_size // groups.unit) for number, group in enumerate(groups.groups) if group.kind != "state"
        ]
        self._allocated = np.zeros(table.layout.blocks, np.int64)
        self._leaving = leaving
        self._asked = asked
        self._coded: set[int] = set()  # blocks that came out of a codec with loss
        self._doubted: set[int] = set()
        self._group = array("b", bytes(0 if leaving is None or groups.plain else table.layout.blocks))

    def end(self, blocks: Blocks[int], step: int, *, by_import: bool = False) -> None:
        """vLLM reallocated `blocks` in `step`: what they held is no longer offered."""
        if blocks:
            if self._leaving is not None:
                self._leaving(blocks, by_import)
            if self._coded:
                self._coded.difference_update(blocks)
            if self._doubted:
                self._doubted.difference_update(blocks)
            ids = int32_array(blocks)
            self._allocated[ids] = step
            self._table.count("evictions", self._table.invalidate(ids))

    def doubt(self, blocks: Set[int]) -> None:
        """Nobody knows what `blocks` hold: neither they nor what was computed behind them is offered before vLLM reallocated
        them."""
        if blocks:
            self._doubted |= blocks
            self._table.count("evictions", self._table.invalidate(int32_array(list(blocks))))

    def imported(self, blocks: Blocks[int], states: npt.NDArray[np.uint64]) -> None:
        """`blocks` are copied from where these are the states of what they become."""
        coded = np.flatnonzero(states[: len(blocks)] & _CODED)
        if len(coded):
            self._coded.update(blocks[place] for place in coded.tolist())

    def groups(self, blocks: Blocks[int]) -> list[int]:
        """Return the KV cache group of each of `blocks`, which are on offer."""
        return [self._group[block] for block in blocks] if self._group else [0] * len(blocks)

    def _quality(self, sequence: Sequence, blocks: Blocks[int], first: int) -> int | npt.NDArray[np.uint64]:
        """Return the bits with which blocks of a sequence are offered, all but its `first` as later ones."""
        if not (sequence.quality & LOSSY or self._coded):
            return sequence.quality
        bits = [(CODED if block in self._coded else 0) | (LATER if block != first else 0) for block in blocks]
        return np.array(bits, np.uint64) | np.uint64(sequence.quality)

    def _mark(self, blocks: Blocks[int], group: int) -> None:
        if self._group:
            for block in blocks:
                self._group[block] = group

    def end_all(self) -> None:
        """Withdraw everything."""
        self._table.count("evictions", self._table.clear())

    def unchanged(self, blocks: Blocks[int], step: int) -> bool:
        """Tell whether all `blocks` still hold what they did when `step` was done."""
        return bool((self._allocated[int32_array(blocks)] <= step).all())

    def publish(self, sequence: Sequence, full_keys: int, step: int, kept: Callable[[int], bool]) -> None:
        """Offer the blocks of a sequence's first `full_keys` keys, as far as `step` filled them and nobody has them since.

        Of groups that do not need all blocks those are offered that vLLM has `kept` for its own prefix cache: the others it
        gives away before any else, as soon as the sequence has moved on. States are offered by `publish_state`.
        """
        first, last = sequence.published, full_keys
        for number, ratio in self._ratios:
            last = min(last, self._sound(sequence.block_ids[number]) * ratio)
        if last <= first:
            return
        keys = sequence.keys(last)
        last = min(last, len(keys))
        self._count(keys, first, last)
        for number, ratio in self._ratios:
            begin, end = first // ratio, last // ratio
            blocks = sequence.block_ids[number][begin:end]
            own = group_keys(keys[begin * ratio : end * ratio], number, ratio)
            ids = int32_array(blocks)
            ours = self._allocated[ids] <= step  # others were reallocated while the step was under way
            if self._groups.groups[number].kind != "full":
                ours &= np.array([block != NULL_BLOCK and kept(block) for block in blocks], np.bool_)
            if not ours.all():
                ids, own = ids[ours], own[ours]
                blocks = ids.tolist()
            self._mark(blocks, number)
            self._table.publish(ids, own, self._quality(sequence, blocks, sequence.block_ids[number][0]))
        sequence.published = last

    def _sound(self, blocks: Blocks[int]) -> int:
        """Return how many of a sequence's blocks come before the first that is in doubt."""
        if not self._doubted:
            return len(blocks)
        return next((place for place, block in enumerate(blocks) if block in self._doubted), len(blocks))

    def _count(self, keys: Keys, first: int, last: int) -> None:
        """Tell that a sequence has the blocks of these keys; a state is as popular as the prefix that it ends."""
        if self._asked is None:
            return
        for number, group in enumerate(self._groups.groups):
            ratio = group.block_size // self._groups.unit
            if last // ratio > first // ratio:
                self._asked(group_keys(keys[first // ratio * ratio : last // ratio * ratio], number, ratio))

    def publish_state(self, sequence: Sequence, group: int, block: int, tokens: int, step: int) -> None:
        """Offer the state behind the first `tokens` tokens, which `step` left in `block`, if that is the end of a block."""
        size = self._groups.groups[group].block_size
        if sequence.published == NEVER or tokens % size or self._allocated[block] > step:
            return
        keys = sequence.keys(tokens // self._groups.unit)
        if len(keys) * self._groups.unit >= tokens:
            self._mark([block], group)
            self._table.publish([block], group_keys(keys[-1:], group), self._quality(sequence, [block], block))  # not coded
            if tokens <= sequence.account.prompt_tokens:
                sequence.states[group] = (tokens, block, step)
