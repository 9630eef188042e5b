"""One request as the connector sees it: its keys, its blocks, and what became of its import."""

from collections.abc import Mapping
from collections.abc import Sequence as Blocks
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.connector.request_accounts import RequestAccount
from transport.groups import Group, needed
from transport.hint import PinWish
from transport.keys import KeyChain, Keys

NULL_BLOCK = 0
"""What vLLM puts in place of a block that a sequence needs no more: never anyone's."""


@dataclass(slots=True)
class Import:
    """An import that is planned or under way, from table `source` in `epoch`: `begin` tokens that we hold become `end`.

    `counts` tells how many of the blocks are of each KV cache group; empty if the model has one, of full attention.
    """

    source: str
    epoch: int
    begin: int
    end: int
    source_blocks: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint64]
    counts: tuple[int, ...] = ()
    target_blocks: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    @property
    def tokens(self) -> int:
        """How many tokens it brings."""
        return self.end - self.begin

    def targets(self, groups: tuple[Group, ...], block_ids: Blocks[Blocks[int]], tokens: int) -> list[int] | None:
        """Return where the blocks of its first `tokens` tokens go in a request's `block_ids`; None if they do not fit."""
        if tokens > self.tokens:
            return None
        if not self.counts:
            size = groups[0].block_size
            found = list(block_ids[0][self.begin // size : (self.begin + tokens) // size])
            return found if len(found) == tokens // size else None
        parts = (needed(group, self.begin, self.end) for group in groups)
        found = [block for part, blocks in zip(parts, block_ids, strict=True) for block in blocks[part.start : part.stop]]
        whole = tokens == self.tokens and len(found) == len(self.source_blocks) and NULL_BLOCK not in found
        return found if whole else None


def fitted(
    plan: tuple[Import, ...], groups: tuple[Group, ...], block_ids: Blocks[Blocks[int]], tokens: int
) -> tuple[tuple[Import, ...], list[list[int]]]:
    """Return the imports that bring the first `tokens` tokens of `plan`, and where the blocks of each go in `block_ids`.

    None if they do not fit there.
    """
    parts, targets = [], []
    for part in plan:
        some = min(tokens, part.tokens)
        blocks = part.targets(groups, block_ids, some) if some else None
        if blocks is None:
            break
        parts.append(part)
        targets.append(blocks)
        tokens -= some
    return (tuple(parts), targets) if not tokens else ((), [])


@dataclass(slots=True)
class Sequence:
    """`block_ids` are in the order of the sequence, a list for each KV cache group.

    `published` counts leading keys whose blocks are known to be on offer, `pin` is what is to be pinned once the prompt is
    computed; `states` are, for a group of states, of the last one that was kept within the prompt the length in tokens, the
    block, and the step that left it there; `quality` are the bits that its blocks are offered with. `planned` are imports, one
    behind the other.
    """

    request: Any
    account: RequestAccount
    chain: KeyChain
    extras: Mapping[int, bytes]
    pin: PinWish | None = None
    quality: int = 0
    block_ids: list[list[int]] = field(default_factory=list)
    published: int = 0
    states: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    planned: tuple[Import, ...] = ()
    tried: bool = False

    def keys(self, blocks: int) -> Keys:
        """Return the keys of at most the first `blocks` full blocks, shape (n, 2); fewer if its tokens are not known yet."""
        have = self.chain.tokens
        tokens = self.request.all_token_ids
        if self.chain.blocks < blocks and len(tokens) > have:
            self.chain.extend(tokens[have : len(tokens)], self.extras)
        return self.chain.keys[:blocks]
