"""The host-memory tier as its replica's scheduler sees it: which blocks are stored, in which slot, and which give way.

Plain code without a clock. A block is on offer in the tier's table only from when every worker has copied it until its slot is
given to another: the same protocol as an engine's table.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from engine.tiers.ages import Ages
from engine.tiers.ask_counts import AskCounts
from engine.tiers.giving_way import ANYBODY, GivingWay
from engine.tiers.slot_room import SlotRoom
from engine.tiers.stores import NO_STORES, Store, Stores
from engine.tiers.tenant_shares import TenantShares
from engine.tiers.tier_pins import TierPins
from transport.hint import PinWish
from transport.keys import Keys
from transport.table.kept_table import KeptTable
from transport.table.quality import CODED, IN_CODE, LATER, LOSSY, mark_of

UNDER_WAY_MAX = 8192
"""Blocks being stored at once: those of two steps that compute 32k tokens each, as the workers tell of a step's when the next
is begun already, beside as many that an idle engine stores ahead. What is given up beyond that is lost, and counted."""
GROUP_TRIES = 64
"""A block that is not coded needs slots side by side: if none of so many coded ones would leave them to it, it is lost."""


class HostMemory:
    """Keeps `table` true. `ranks` are the workers that must have copied a block; `elsewhere` tells which of some keys (n, 2)
    another tier of this node holds.

    The least popular block gives way (`GivingWay`), by how often requests asked for it, whether it was here or not; where a
    tenant has more than the share `tenant_share_max`, the least popular one of its own; pinned ones, at most the share
    `pin_share_max`, stay. What the table offers already, from
    before a restart, is kept, as if all of it had been asked for once. A block stays for `ttl_seconds` at most (0: without end)
    once it is stored, or from then on, but for what is pinned or being read; `expire` says how late it is.
    """

    def __init__(
        self,
        table: KeptTable,
        *,
        ranks: int,
        elsewhere: Callable[[Keys], npt.NDArray[np.bool_]],
        tenant_share_max: float = 1.0,
        pin_share_max: float = 0.0,
        ttl_seconds: float = 0.0,
    ) -> None:
        self._table = table
        self._ranks = ranks
        self._elsewhere = elsewhere
        slots, keys = table.all_offered()
        found = dict(zip(map(bytes, keys), slots, strict=True))
        self._asks = AskCounts(table.layout.blocks)
        kept = sorted(found.values())
        table.invalidate(list(set(slots).difference(kept)))  # a second slot under the same key
        self._coded = table.coded
        whole, quality = self._coded.whole if self._coded is not None else 1, table.quality(kept)
        sizes = dict(zip(kept, (1 if each & IN_CODE else whole for each in quality), strict=True))
        self._marks = dict(zip(kept, map(mark_of, quality), strict=True))
        """Whose block is or goes into each slot that is taken."""
        self._stored = GivingWay(found, self._marks)
        self._room = SlotRoom(table.layout.blocks, sizes, whole=whole)
        self._shares = TenantShares(table.layout.blocks, tenant_share_max)
        for slot, size in sizes.items():
            self._shares.took(self._marks[slot], size)
        self._ages = Ages(int(ttl_seconds * 1e9), kept) if ttl_seconds else None
        self._pins = TierPins(int(pin_share_max * table.layout.blocks) // self._room.whole)
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
            for place, other in zip(fresh, held.tolist(), strict=True):
                key = keys[place].tobytes()
                if not other or key in self._pins:
                    self._begin(blocks[place], key, groups[place], quality[place], asks[place])
        if self._gave_way:  # together: most of what the table takes is a call's own
            self._table.count("evictions", self._table.invalidate(self._gave_way))
            self._gave_way = []
        if ahead:
            self._table.count("tier_ahead_blocks", len(self._begun) - before)

    def pin(
        self,
        wish: PinWish,
        blocks: Sequence[int],
        keys: Keys,
        groups: Sequence[int],
        quality: Sequence[int],
        now_ns: int,
    ) -> None:
        """Store what `blocks` hold under `keys`, (n, 2), unless it is here, and keep it until the pin ends. Nothing is done if
        pins have no room for it."""
        taken = self._pins.take(wish, map(bytes, keys), now_ns)
        if taken is None:
            return
        for key in taken[0]:
            if (slot := self._stored.slot(key)) is not None:
                self._stored.hold(slot)
        self._unpinned(taken[1])
        self.take(blocks, keys, groups, quality, ahead=True)

    def unpin(self, ids: Sequence[int]) -> None:
        """End pins, by number."""
        self._unpinned(self._pins.drop(ids))

    def expire(self, now_ns: int) -> None:
        """End the pins whose time is up, and have the blocks give way that are too old: called in every step."""
        self._unpinned(self._pins.expire(now_ns))
        if self._ages is not None and (gone := self._ages.expire(now_ns, self._stored.drop)):
            for slot in gone:
                self._free(slot)
            self._table.count("evictions", self._table.invalidate(gone))

    def _unpinned(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            if (slot := self._stored.slot(key)) is not None:
                self._stored.release(slot)

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
                self._free(slot)
                continue
            filled.append(store)
        if filled:
            self._offer(filled)

    def _offer(self, filled: list[Store]) -> None:
        """These stores are complete."""
        keys = np.frombuffer(b"".join(store.key for store in filled), np.uint64).reshape(-1, 2)
        self._table.publish([store.slot for store in filled], keys, np.array([store.quality for store in filled], np.uint64))
        for store in filled:
            self._stored.put(store.key, store.slot, self._coming.pop(store.key), mark_of(store.quality))
            if self._ages is not None:
                self._ages.filled(store.slot)
            if store.key in self._pins:
                self._stored.hold(store.slot)

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
        self._pins.clear()
        if self._ages is not None:
            self._ages.clear()
        for slot in self._stored.clear():
            self._free(slot)
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
        if self._codes(quality):
            quality |= CODED | IN_CODE
        slot = self._free_slot(1 if quality & IN_CODE else self._room.whole, mark_of(quality))
        if slot is None:
            self._table.count("tier_dropped_blocks")
            return
        store = Store(block, slot, group, key, quality)
        self._under_way[slot] = (store, 0)
        self._coming[key] = asked
        self._read[block] = slot
        self._begun.append(store)

    def _codes(self, quality: int) -> bool:
        """Whether a block with these bits is coded here."""
        coded = self._coded
        return coded is not None and quality & (LOSSY | CODED) == LOSSY and bool(coded.first or quality & LATER)

    def _free_slot(self, size: int, mark: int) -> int | None:
        """Return the first of `size` slots that may be written once what gave way is withdrawn; None if too much is under way
        or held. A tenant that has its share gets no other's slots."""
        if len(self._under_way) >= UNDER_WAY_MAX:
            return None
        while (slot := self._room.take(size)) is None:
            if not self._yield_room(size, mark):
                return None
        self._marks[slot] = mark
        self._shares.took(mark, size)
        return slot

    def _yield_room(self, size: int, mark: int) -> bool:
        """Have blocks give way to one of this tenant's: of whoever has more than its share, and where all of that are held, of
        anybody. False if none may."""
        yields = self._shares.yields(mark, size)
        if yields != [mark]:
            scattered = self._room.singles >= size  # there is room
            yields += [mark, ANYBODY] if scattered and not yields else [ANYBODY]
        return any(self._make_room(size, whose) for whose in yields)

    def _make_room(self, size: int, whose: int) -> bool:
        """Have the least popular block give way, or of coded ones, if `size` slots side by side are needed, the first beside
        which nothing stays: `whose` they are, all of them. False, and all stay, if there are none."""
        if size == 1:
            going = self._stored.pop(whose)
            if going is not None:
                self._give_way(going)
            return going is not None
        for slot in self._stored.next(GROUP_TRIES, whose):
            beside = self._room.beside(slot)
            if self._room.in_whole(slot) and all(self._stored.may_go(each, whose) for each in beside):
                self._stored.pop_this(slot)
                self._give_way(slot)
                for each in beside:
                    self._stored.drop(each)
                    self._give_way(each)
                return True
        return False

    def _give_way(self, slot: int) -> None:
        self._gave_way.append(slot)
        if self._ages is not None:
            self._ages.emptied(slot)
        self._free(slot)

    def _free(self, slot: int) -> None:
        self._shares.took(self._marks.pop(slot), -self._room.size(slot))
        self._room.give(slot)
