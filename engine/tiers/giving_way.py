"""In which order the blocks of a tier give way: the least popular first, and what was popular once fades."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice

ANYBODY = -1
"""In place of a tenant's mark."""


class _Queues:
    """Slots by their value; of equal values in the order in which they came."""

    __slots__ = ("_least", "_slots")

    def __init__(self) -> None:
        self._slots: dict[int, OrderedDict[int, None]] = {}
        self._least = 0  # no value here is below it

    def add(self, slot: int, value: int) -> None:
        queue = self._slots.get(value)
        if queue is None:
            queue = self._slots[value] = OrderedDict()
            self._least = min(self._least, value)
        queue[slot] = None

    def remove(self, slot: int, value: int) -> None:
        queue = self._slots[value]
        del queue[slot]
        if not queue:
            del self._slots[value]

    def first(self) -> int | None:
        """Return the slot of the least value that came first; None if there is none."""
        if not self._slots:
            return None
        if self._least not in self._slots:
            self._least = min(self._slots)
        return next(iter(self._slots[self._least]))

    def in_order(self) -> Iterator[int]:
        """Yield every slot, as they would be `first` one after the other."""
        return (slot for value in sorted(self._slots) for slot in self._slots[value])

    def each(self) -> Iterator[tuple[int, int]]:
        """Yield every slot and its value, those of one value in their order."""
        return ((slot, value) for value, queue in self._slots.items() for slot in queue)


class GivingWay:
    """Blocks under their keys, each in a slot, and each of a tenant, who is known by a mark. Not thread safe.

    The block of the least value gives way: how often it was asked for, added to the value of the last one that gave way
    (GreedyDual; Cao and Irani, USENIX 1997). Of equal ones it is the one that was stored or used longest ago, so blocks that
    were all asked for equally often give way as in an LRU cache. Values are whole numbers and few, so the slots of each are a
    queue of their own, and a step takes O(1), a `pop` at most as many as there are different values.
    """

    def __init__(self, stored: Mapping[bytes, int], marks: Mapping[int, int] | None = None) -> None:
        """Take over slots by their keys, with their tenants' `marks`, by slot; each was asked for once, in that order."""
        self._slots: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._values: dict[int, int] = {}
        self._marks: dict[int, int] = {}
        self._all = _Queues()
        self._own: dict[int, _Queues] = {}  # of each tenant; none as long as all blocks were of the one with the mark `_one`
        self._one = ANYBODY
        self._level = 0  # what is used or stored has a value above it
        self._readers: dict[int, int] = {}  # slots that are held: in no queue
        for key, slot in stored.items():
            self.put(key, slot, 1, (marks or {}).get(slot, 0))

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def key(self, slot: int) -> bytes | None:
        """Return what is stored in a slot; None if nothing is."""
        return self._keys.get(slot)

    def slot(self, key: bytes) -> int | None:
        """Return where a block is stored; None if it is not here."""
        return self._slots.get(key)

    def put(self, key: bytes, slot: int, asked: int, mark: int = 0) -> None:
        """Store a block that is not here, in a slot that is not taken; it was asked for so often."""
        if mark != self._one and not self._own:
            self._other(mark)
        self._slots[key], self._keys[slot], self._marks[slot] = slot, key, mark
        self._enqueue(slot, self._level + asked)

    def used(self, key: bytes, asked: int) -> None:
        """A block that is here was used, or would be stored again; it was asked for so often. That never lowers its value."""
        slot = self._slots[key]
        value = max(self._values[slot], self._level + asked)
        if slot in self._readers:
            self._values[slot] = value
        else:
            self._dequeue(slot)
            self._enqueue(slot, value)

    def hold(self, slot: int) -> None:
        """A taken slot does not give way before `release` was called as often as this: it is being read, or pinned."""
        if slot not in self._readers:
            self._dequeue(slot)
        self._readers[slot] = self._readers.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """A read of a slot, or its pin, ended. Of one that is not held nothing happens."""
        readers = self._readers.pop(slot, 0)
        if readers > 1:
            self._readers[slot] = readers - 1
        elif readers:
            self._enqueue(slot, max(self._values[slot], self._level))

    def pop(self, mark: int = ANYBODY) -> int | None:
        """Return the slot of the block that gives way, of the tenant with this mark alone or of anybody; it is here no more.

        None if there is none, or all are held.
        """
        queues = self._queues(mark)
        slot = queues.first() if queues is not None else None
        if slot is not None:
            self.pop_this(slot)
        return slot

    def pop_this(self, slot: int) -> None:
        """Have the block in a slot, which may go, give way as if it were its turn."""
        self._level = max(self._level, self._values[slot])
        self._forget(slot)

    def next(self, count: int, mark: int = ANYBODY) -> Iterator[int]:
        """Yield the first `count` slots that `pop` would return one after the other, as long as nothing changes. It takes time
        for each different value."""
        queues = self._queues(mark)
        return islice(queues.in_order() if queues is not None else (), count)

    def may_go(self, slot: int, mark: int = ANYBODY) -> bool:
        """Whether there is a block in a slot, of the tenant with this mark or of anybody, and it is not held."""
        return slot in self._keys and slot not in self._readers and mark in (ANYBODY, self._marks[slot])

    def drop(self, slot: int) -> bool:
        """Have the block in a slot give way before its time; False if there is none, or it is held."""
        if not self.may_go(slot):
            return False
        self._forget(slot)
        return True

    def clear(self) -> list[int]:
        """Give up all blocks, held ones too; return their slots."""
        slots = list(self._keys)
        for each in (self._slots, self._keys, self._values, self._marks, self._readers):
            each.clear()
        self._all, self._own, self._one = _Queues(), {}, ANYBODY
        return slots

    def _queues(self, mark: int) -> _Queues | None:
        return self._all if mark in (ANYBODY, self._one) else self._own.get(mark)

    def _other(self, mark: int) -> None:
        """A block of another tenant comes: from now on each has queues of its own, which takes time for every block."""
        if not self._slots:
            self._one = mark
            return
        self._one = ANYBODY
        self._own = {each: _Queues() for each in {mark, *self._marks.values()}}
        for slot, value in self._all.each():
            self._own[self._marks[slot]].add(slot, value)

    def _forget(self, slot: int) -> None:
        self._dequeue(slot)
        del self._values[slot], self._marks[slot], self._slots[self._keys.pop(slot)]

    def _enqueue(self, slot: int, value: int) -> None:
        self._values[slot] = value
        self._all.add(slot, value)
        if self._own:
            mark = self._marks[slot]
            own = self._own.get(mark)
            if own is None:
                own = self._own[mark] = _Queues()
            own.add(slot, value)

    def _dequeue(self, slot: int) -> None:
        value = self._values[slot]
        self._all.remove(slot, value)
        if self._own:
            self._own[self._marks[slot]].remove(slot, value)
