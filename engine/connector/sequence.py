"""One request as the connector sees it: its keys, its blocks, and what became of its import."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.connector.accounts import Account
from transport.hint import PinWish
from transport.keys import KeyChain, Keys


@dataclass(slots=True)
class Import:
    """An import that is planned or under way: from table `source` in `epoch`, behind `local_blocks` that we hold ourselves."""

    source: str
    epoch: int
    local_blocks: int
    source_blocks: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint64]
    target_blocks: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    ranks_done: int = 0

    def __len__(self) -> int:
        return len(self.source_blocks)


@dataclass(slots=True)
class Sequence:
    """Blocks are ids in the order of the sequence; `published` counts leading blocks known to be on offer.

    `pin` is what is to be pinned once the prompt is computed.
    """

    request: Any
    account: Account
    chain: KeyChain
    extras: Mapping[int, bytes]
    pin: PinWish | None = None
    block_ids: list[int] = field(default_factory=list)
    published: int = 0
    planned: Import | None = None
    tried: bool = False

    def keys(self, blocks: int) -> Keys:
        """Return the keys of at most the first `blocks` full blocks, shape (n, 2); fewer if its tokens are not known yet."""
        have = self.chain.tokens
        tokens = self.request.all_token_ids
        if self.chain.blocks < blocks and len(tokens) > have:
            self.chain.extend(tokens[have : len(tokens)], self.extras)
        return self.chain.keys[:blocks]
