"""Which slots of a tier are free: single ones for coded blocks, and whole groups side by side for the others."""

from collections.abc import Mapping


class SlotRoom:
    """Slots 0 to `count` - 1, of which `taken` tells by their first ones how many each block has. Plain code.

    A block has one slot, or `whole` slots, the first of these with a multiple of that as its number. The slots of such a group
    go to blocks that are stored one after the other, which mostly give way together as well.
    """

    def __init__(self, count: int, taken: Mapping[int, int], *, whole: int) -> None:
        self._count = count
        self.whole = whole
        """Slots of a block that is not coded."""
        self.singles = 0
        """Free slots in groups that have taken ones, or are not whole."""
        self._taken = dict(taken)
        self._groups: list[int] = []
        self._parts: dict[int, list[int]] = {}
        """The free slots of each group of which some are taken."""
        used = {slot + more for slot, size in taken.items() for more in range(size)}
        for slot in reversed(range(count)):
            if slot not in used:
                self._free(slot)

    def take(self, size: int) -> int | None:
        """Return the first of `size` free slots, one or `whole`, which are taken then; None if there are none that fit."""
        if size == 1 and self._parts:
            group, free = next(reversed(self._parts.items()))
            slot = free.pop()
            self.singles -= 1
            if not free:
                del self._parts[group]
        elif self._groups:
            slot = self._groups.pop()
            if size == 1 and self.whole > 1:
                self._parts[slot // self.whole] = list(range(slot + self.whole - 1, slot, -1))
                self.singles += self.whole - 1
        else:
            return None
        self._taken[slot] = size
        return slot

    def size(self, slot: int) -> int:
        """Return how many slots the block in `slot` has."""
        return self._taken[slot]

    def give(self, slot: int) -> None:
        """The block in `slot` is there no more."""
        size = self._taken.pop(slot)
        if size == self.whole:
            self._groups.append(slot)
        else:
            self._free(slot)

    def beside(self, slot: int) -> list[int]:
        """Return the other slots of the group of a slot in which there are blocks."""
        first = slot // self.whole * self.whole
        return [other for other in range(first, first + self.whole) if other != slot and other in self._taken]

    def in_whole(self, slot: int) -> bool:
        """Whether the group of a slot has `whole` slots: the last one may have fewer."""
        return slot // self.whole * self.whole + self.whole <= self._count

    def _free(self, slot: int) -> None:
        group = slot // self.whole
        free = self._parts.setdefault(group, [])
        free.append(slot)
        self.singles += 1
        if len(free) == self.whole:
            del self._parts[group]
            self.singles -= self.whole
            self._groups.append(group * self.whole)
