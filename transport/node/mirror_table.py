"""A mirror of another node's block table: the same blocks, states and keys, in this node's shared memory.

Everybody here reads it as any other table: the gateway steers on it, engines look up in it. Its one writer is the agent, which
hears of changes a little later than they happen. So a block may be told as held that is not any more; its owner's node checks
that when it is asked for the block.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from transport.keys import Keys
from transport.table.deliveries import Delivery
from transport.table.fence import fence
from transport.table.layout import COUNTERS, COUNTERS_OFFSET, LOAD, VALID_OFFSET, Description
from transport.table.writer import TableWriter

_ONE = np.uint64(1)


class MirrorTable(TableWriter):
    """`epoch` is the owner's. Raises what TableWriter raises."""

    def __init__(self, directory: Path, description: Description, block_size: int, blocks: int, epoch: int) -> None:
        super().__init__(directory, description, block_size, blocks, epoch)
        self._tags: set[int] = set()

    def change(self, ids: npt.NDArray[np.int64], states: npt.NDArray[np.uint64], keys: Keys) -> None:
        """These blocks, all different, have these states (n,) now, and keys (n, 2). Raises IndexError for one beyond it."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.layout.blocks:
            raise IndexError("a block beyond the table")
        held = self._states[ids] & _ONE == 0
        self._unlist(ids[held])
        self._states[ids] |= _ONE
        fence()
        valid = states & _ONE == 0
        self._keys[ids[valid]] = keys[valid]
        fence()
        self._states[ids] = states
        self._index_add(ids[valid], keys[valid])
        self._words[VALID_OFFSET // 8] += int(valid.sum()) - int(held.sum())
        self._journal.note(ids)

    def _unlist(self, ids: npt.NDArray[np.int64]) -> None:
        buckets = self._keys[ids, 0] & self._mask
        rows = self._index[buckets] == (ids + 1)[:, None]
        found = rows.any(axis=1)
        self._index[buckets[found], rows[found].argmax(axis=1)] = 0

    def tell_engine(self, heartbeat_ns: int, load: dict[str, int], counters: dict[str, int], waiting: tuple[int, ...]) -> None:
        """Record what the owner says of its engine; what this release has no name for is left out."""
        self.beat(heartbeat_ns)
        self.tell_load([load.get(name, 0) for name in LOAD])
        for place, name in enumerate(COUNTERS, COUNTERS_OFFSET // 8):
            self._words[place] = counters.get(name, 0)
        tags = set(waiting)
        for tag in self._tags - tags:
            self.waiting.remove(tag)
        for tag in tags - self._tags:
            self.waiting.add(tag)
        self._tags = tags

    def told(self, delivery: Delivery) -> None:
        """Append a delivery record of the owner's."""
        self.deliver(delivery, "tcp" if delivery.source else "")
