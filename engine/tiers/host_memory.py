"""The host-memory tier as its replica's scheduler sees it: which blocks are stored, in which slot, and which give way.

Plain code without a clock. A block is on offer in the tier's table only from when every worker has copied it until its slot is
given to another: the same protocol as an engine's table.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engine.tiers.stores import NO_STORES, Store, Stores
from transport.keys import Keys
from transport.table.kept_table import KeptTable

UNDER_WAY_MAX = 1024
"""Blocks being stored at once; what is given up beyond that is lost, and counted."""


class HostMemory:
    """Keeps `table` true. `ranks` are the workers that must have copied a block; `elsewhere` tells which of some keys (n, 2)
    another tier of this node holds.

    The least recently stored or restored block gives way. What the table offers already, from before a restart, is kept, in no
    known order.
    """

    def __init__(self, table: KeptTable, *, ranks: int, elsewhere: Callable[[Keys], npt.NDArray[np.bool_]]) -> None:
        self._table = table
        self._ranks = ranks
        self._elsewhere = elsewhere
        slots, keys = table.all_offered()
        self._stored: OrderedDict[bytes, int] = OrderedDict(zip(map(bytes, keys), slots, strict=True))
        self._keys = {slot: key for key, slot in self._stored.items()}
        kept = set(self._stored.values())
        table.invalidate([slot for slot in slots if slot not in kept])  # a second slot under the same key
        self._free = [slot for slot in reversed(range(table.layout.blocks)) if slot not in kept]
        self._under_way: dict[int, tuple[Store, int]] = {}
        self._coming: set[bytes] = set()
        self._void: set[int] = set()
        self._read: dict[int, int] = {}
        self._begun: list[Store] = []
        self._overwritten: set[int] = set()

    @property
    def name(self) -> str:
        """The name under which its blocks are imported."""
        return self._table.path.stem

    def take(self, blocks: Sequence[int], keys: Keys, groups: Sequence[int]) -> None:
        """Store what `blocks` hold under `keys`, (n, 2): they are likely to be reallocated soon. Those of one that is here
        already, or in another tier, are not copied."""
        if not blocks:
            return
        known = [self._known(key) for key in map(bytes, keys)]
        fresh = [place for place, each in enumerate(known) if not each]
        if fresh:
            held = self._elsewhere(keys[fresh])
            for place in (place for place, other in zip(fresh, held.tolist(), strict=True) if not other):
                self._begin(blocks[place], keys[place].tobytes(), groups[place])

    def overwritten(self, blocks: Iterable[int]) -> None:
        """The next step overwrites `blocks`: those that are being stored must have been copied before."""
        self._overwritten.update(block for block in blocks if block in self._read)

    def take_stores(self) -> Stores:
        """Return what the workers have to do in this step, once."""
        if not self._begun and not self._overwritten:
            return NO_STORES
        stores = Stores(tuple(self._begun), frozenset(self._overwritten))
        self._begun, self._overwritten = [], set()
        return stores

    def copied(self, slots: Mapping[int, int]) -> None:
        """So many more workers have copied what goes into these slots: offer those that all have."""
        for slot, ranks in slots.items():
            entry = self._under_way.get(slot)
            if entry is None:
                continue
            store, done = entry[0], entry[1] + ranks
            if done < self._ranks:
                self._under_way[slot] = (store, done)
                continue
            del self._under_way[slot]
            if self._read.get(store.block) == slot:
                del self._read[store.block]
            if slot in self._void:
                self._void.discard(slot)
                self._free.append(slot)
                continue
            self._coming.discard(store.key)
            self._table.publish([slot], np.frombuffer(store.key, np.uint64).reshape(1, 2))
            self._stored[store.key] = slot
            self._keys[slot] = store.key

    def restored(self, slots: Iterable[int]) -> None:
        """These slots are being read: they give way last."""
        for slot in slots:
            key = self._keys.get(slot)
            if key is not None:
                self._stored.move_to_end(key)

    def clear(self) -> None:
        """Give up everything that is stored or being stored."""
        self._table.count("evictions", self._table.clear())
        self._free += self._stored.values()
        self._stored.clear()
        self._keys.clear()
        self._void.update(self._under_way)
        self._coming.clear()

    def _known(self, key: bytes) -> bool:
        if key in self._stored:
            self._stored.move_to_end(key)
            return True
        return key in self._coming

    def _begin(self, block: int, key: bytes, group: int) -> None:
        if key in self._coming:  # twice among the blocks that are taken together
            return
        slot = self._room()
        if slot is None:
            self._table.count("tier_dropped_blocks")
            return
        store = Store(block, slot, group, key)
        self._under_way[slot] = (store, 0)
        self._coming.add(key)
        self._read[block] = slot
        self._begun.append(store)

    def _room(self) -> int | None:
        """Return a slot that may be written, withdrawing what gives way; None if too much is under way."""
        if len(self._under_way) >= UNDER_WAY_MAX:
            return None
        if self._free:
            return self._free.pop()
        if not self._stored:
            return None
        _, slot = self._stored.popitem(last=False)
        del self._keys[slot]
        self._table.count("evictions", self._table.invalidate([slot]))
        return slot
