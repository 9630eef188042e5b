"""The seam between a node's agent and the ways to fetch blocks from another node."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from transport.node.messages import BlocksAsked, Loss, NodeError
from transport.node.staging import Piece

FETCH_SECONDS_MAX = 20.0
"""However slowly blocks come, a fetch ends then."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Which of the blocks came well, (n,), and why not all: in words, and as what it counts."""

    good: npt.NDArray[np.bool_]
    reason: str = ""
    loss: Loss = "changed"


class NotOffered(NodeError):
    """The blocks cannot be fetched in this way, while others can. Nothing was begun."""


class StillWritten(NodeError):
    """The fetch has ended, but what it began may yet write into its target, which knows of it (`Piece.writing`)."""


class BlockFetcher(Protocol):
    """One way to fetch blocks from one other node. Any thread may call."""

    def fetch(self, asked: BlocksAsked, sizes: Sequence[int], target: Piece) -> Fetched:
        """Put n blocks of `sizes` bytes into the first n slots of `target`.

        A block is good only if its owner's node, once it had been copied, still said of it what was looked up; the slots of
        others may hold anything. Nothing beyond a block's bytes is written. Raises NodeError if the way failed, within
        seconds, whatever the other node does: StillWritten if something may write into the slots yet.
        """

    def close(self) -> None:
        """End the fetches that are under way; later ones fail."""
