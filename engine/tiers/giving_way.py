"""In which order the blocks of a tier give way: the least popular first, and what was popular once fades."""

from collections import OrderedDict
from collections.abc import Mapping


class GivingWay:
    """Blocks under their keys, each in a slot. Not thread safe.

    The block of the least value gives way: how often it was asked for, added to the value of the last one that gave way
    (GreedyDual; Cao and Irani, USENIX 1997). Of equal ones it is the one that was stored or used longest ago, so blocks that
    were all asked for equally often give way as in an LRU cache. Values are whole numbers and few, so the slots of each are a
    queue of their own, and a step takes O(1), a `pop` at most as many as there are different values.
    """

    def __init__(self, stored: Mapping[bytes, int]) -> None:
        """Take over slots by their keys; each was asked for once, in that order."""
        self._slots = dict(stored)
        self._keys = {slot: key for key, slot in self._slots.items()}
        self._values = dict.fromkeys(self._keys, 1)
        self._queues: dict[int, OrderedDict[int, None]] = {}
        if stored:
            self._queues[1] = OrderedDict.fromkeys(self._keys)
        self._level = 0  # no value in a queue is below it
        self._readers: dict[int, int] = {}  # slots that are held: in no queue

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def key(self, slot: int) -> bytes | None:
        """Return what is stored in a slot; None if nothing is."""
        return self._keys.get(slot)

    def put(self, key: bytes, slot: int, asked: int) -> None:
        """Store a block that is not here, in a slot that is not taken; it was asked for so often."""
        self._slots[key], self._keys[slot] = slot, key
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
        """A taken slot is being read: it does not give way before `release` was called as often as this."""
        if slot not in self._readers:
            self._dequeue(slot)
        self._readers[slot] = self._readers.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """A read of a slot ended. Of one that is not held nothing happens."""
        readers = self._readers.pop(slot, 0)
        if readers > 1:
            self._readers[slot] = readers - 1
        elif readers:
            self._enqueue(slot, max(self._values[slot], self._level))

    def pop(self) -> int | None:
        """Return the slot of the block that gives way, which is here no more; None if there is none, or all are held."""
        if not self._queues:
            return None
        if self._level not in self._queues:
            self._level = min(self._queues)
        slot = next(iter(self._queues[self._level]))
        self._forget(slot)
        return slot

    def drop(self, slot: int) -> bool:
        """Have the block in a slot give way before its time; False if there is none, or it is held."""
        if slot not in self._keys or slot in self._readers:
            return False
        self._forget(slot)
        return True

    def _forget(self, slot: int) -> None:
        self._dequeue(slot)
        del self._values[slot], self._slots[self._keys.pop(slot)]

    def clear(self) -> list[int]:
        """Give up all blocks, held ones too; return their slots."""
        slots = list(self._keys)
        for each in (self._slots, self._keys, self._values, self._queues, self._readers):
            each.clear()
        return slots

    def _enqueue(self, slot: int, value: int) -> None:
        self._values[slot] = value
        queue = self._queues.get(value)
        if queue is None:
            queue = self._queues[value] = OrderedDict()
        queue[slot] = None

    def _dequeue(self, slot: int) -> None:
        value = self._values[slot]
        queue = self._queues[value]
        del queue[slot]
        if not queue:
            del self._queues[value]
