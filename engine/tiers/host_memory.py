"""The host-memory tier as its replica's scheduler sees it: which blocks are stored, in which slot, and which give way.

Plain code without a clock. A block is on offer in the tier's table only from when every worker has copied it until its slot is
given to another: the same protocol as an engine's table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engine.tiers.ask_counts import AskCounts
from engine.tiers.giving_way import GivingWay
from engine.tiers.slot_room import SlotRoom
from engine.tiers.stores import NO_STORES, Store, Stores
from transport.keys import Keys
from transport.table.kept_table import KeptTable
from transport.table.quality import CODED, IN_CODE, LOSSY

UNDER_WAY_MAX = 8192
"""Blocks being stored at once: those of two steps that compute 32k tokens each, as the workers tell of a step's when the next
is begun already, beside as many that an idle engine stores ahead. What is given up beyond that is lost, and counted."""


class HostMemory:
    """Keeps `table` true. `ranks` are the workers that must have copied a block; `elsewhere` tells which of some keys (n, 2)
    another tier of this node holds.

    The least popular block gives way (`GivingWay`), by how often requests asked for it, whether it was here or not. What the
    table offers already, from before a restart, is kept, as if all of it had been asked for once.
    """

    def __init__(self, table: KeptTable, *, ranks: int, elsewhere: Callable[[Keys], npt.NDArray[np.bool_]]) -> None:
        self._table = table
        self._ranks = ranks
        self._elsewhere = elsewhere
        slots, keys = table.all_offered()
        found = dict(zip(map(bytes, keys), slots, strict=True))
        self._stored = GivingWay(found)
        self._asks = AskCounts(table.layout.blocks)
        kept = sorted(found.values())
        table.invalidate(list(set(slots).difference(kept)))  # a second slot under the same key
        whole = 2 if table.codes else 1
        sizes = (1 if quality & IN_CODE else whole for quality in table.quality(kept))
        self._room = SlotRoom(table.layout.blocks, dict(zip(kept, sizes, strict=True)), pairs=table.codes)
        self._under_way: dict[int, tuple[Store, int]] = {}
        self._coming: dict[bytes, int] = {}
        """Keys of what is being stored, and how often each was asked for."""
        self._void: set[int] = set()
        self._read: dict[int, int] = {}
        self._begun: list[Store] = []
        self._gave_way: list[int] = []
        self._overwritten: set[int] = set()
        self._imported: set[int] = set()
        self._lost: set[int] = set()

    @property
    def name(self) -> str:
        """The name under which its blocks are imported."""
        return self._table.path.stem

    def asked(self, keys: Keys) -> None:
        """A request asked for the blocks of these keys, (n, 2), which are all different, and had or computed them."""
        self._asks.add(keys)

    def take(
        self, blocks: Sequence[int], keys: Keys, groups: Sequence[int], quality: Sequence[int], *, ahead: bool = False
    ) -> None:
        """Store what `blocks` hold under `keys`, (n, 2): they are being reallocated, or, `ahead`, will be. Those of one that is
        here already, or in another tier, are not copied."""
        if not blocks:
            return
        before = len(self._begun)
        asks = self._asks.of(keys).tolist()
        known = [self._known(key, asked) for key, asked in zip(map(bytes, keys), asks, strict=True)]
        fresh = [place for place, each in enumerate(known) if not each]
        if fresh:
            held = self._elsewhere(keys[fresh])
            for place in (place for place, other in zip(fresh, held.tolist(), strict=True) if not other):
                self._begin(blocks[place], keys[place].tobytes(), groups[place], quality[place], asks[place])
        if self._gave_way:  # together: most of what the table takes is a call's own
            self._table.count("evictions", self._table.invalidate(self._gave_way))
            self._gave_way = []
        if ahead:
            self._table.count("tier_ahead_blocks", len(self._begun) - before)

    def overwritten(self, blocks: Iterable[int], *, by_import: bool = False) -> None:
        """The next step, or an import that begins in it, overwrites `blocks`: those that are being stored must have been copied
        before."""
        (self._imported if by_import else self._overwritten).update(block for block in blocks if block in self._read)

    def lost(self, blocks: Iterable[int]) -> None:
        """Some workers overwrite `blocks` before they can copy them in the next step."""
        self._lost.update(block for block in blocks if block in self._read)

    def take_stores(self, *, at_once: bool = False) -> Stores:
        """Return what the workers have to do in this step, once; `at_once`: it may be the last for long, or others wait."""
        if not (self._begun or self._overwritten or self._imported or self._lost):
            return NO_STORES
        imported = frozenset(self._imported - self._overwritten)
        stores = Stores(tuple(self._begun), frozenset(self._overwritten), frozenset(self._lost), imported, at_once)
        self._begun, self._overwritten, self._imported, self._lost = [], set(), set(), set()
        return stores

    def copied(self, slots: Mapping[int, int], lost: Iterable[int] = ()) -> None:
        """So many more workers are done with what goes into these slots: offer those that all have copied, none of `lost`."""
        for slot in lost:
            if slot in self._under_way and slot not in self._void:
                self._void.add(slot)
                self._coming.pop(self._under_way[slot][0].key, None)
                self._table.count("tier_dropped_blocks")
        filled: list[Store] = []
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
                self._room.give(slot)
                continue
            filled.append(store)
        if filled:
            self._offer(filled)

    def _offer(self, filled: list[Store]) -> None:
        """These stores are complete."""
        keys = np.frombuffer(b"".join(store.key for store in filled), np.uint64).reshape(-1, 2)
        self._table.publish([store.slot for store in filled], keys, np.array([store.quality for store in filled], np.uint64))
        for store in filled:
            self._stored.put(store.key, store.slot, self._coming.pop(store.key))

    def restored(self, slots: Iterable[int]) -> None:
        """These slots are being read for a request: they do not give way before `read` is told of them."""
        keys = {slot: key for slot in slots if (key := self._stored.key(slot)) is not None}
        if not keys:
            return
        asks = self._asks.of(np.frombuffer(b"".join(keys.values()), np.uint64).reshape(-1, 2)).tolist()
        for (slot, key), asked in zip(keys.items(), asks, strict=True):
            self._stored.used(key, asked + 1)  # by now, but it is counted only when the request has them
            self._stored.hold(slot)

    def read(self, slots: Iterable[int]) -> None:
        """A read of these slots ended."""
        for slot in slots:
            self._stored.release(slot)

    def clear(self) -> None:
        """Give up everything that is stored or being stored."""
        self._table.count("evictions", self._table.clear())
        for slot in self._stored.clear():
            self._room.give(slot)
        self._void.update(self._under_way)
        self._coming.clear()

    def _known(self, key: bytes, asked: int) -> bool:
        if key in self._stored:
            self._stored.used(key, asked)
            return True
        return key in self._coming

    def _begin(self, block: int, key: bytes, group: int, quality: int, asked: int) -> None:
        if key in self._coming:  # twice among the blocks that are taken together
            return
        if self._table.codes and quality & (LOSSY | CODED) == LOSSY:
            quality |= CODED | IN_CODE
        slot = self._free_slot(1 if quality & IN_CODE else self._room.whole)
        if slot is None:
            self._table.count("tier_dropped_blocks")
            return
        store = Store(block, slot, group, key, quality)
        self._under_way[slot] = (store, 0)
        self._coming[key] = asked
        self._read[block] = slot
        self._begun.append(store)

    def _free_slot(self, size: int) -> int | None:
        """Return the first of `size` slots that may be written once what gave way is withdrawn; None if too much is under way
        or being read."""
        if len(self._under_way) >= UNDER_WAY_MAX:
            return None
        while (slot := self._room.take(size)) is None:
            going = self._stored.pop()
            if going is None:
                return None
            self._give_way(going)
            beside = self._room.beside(going) if size == 2 else None
            if beside is not None and self._stored.drop(beside):
                self._give_way(beside)
        return slot

    def _give_way(self, slot: int) -> None:
        self._gave_way.append(slot)
        self._room.give(slot)
