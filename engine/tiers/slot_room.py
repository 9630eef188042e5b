"""Which slots of a tier are free: single ones for coded blocks, and pairs side by side for the others."""

from collections.abc import Mapping


class SlotRoom:
    """Slots 0 to `count` - 1, of which `taken` tells by their first ones how many each block has. Plain code.

    `pairs`: blocks have one slot or two, the first of these with an even number; else all have one. The slots of a pair go to
    blocks that are stored one after the other, which mostly give way together as well.
    """

    def __init__(self, count: int, taken: Mapping[int, int], *, pairs: bool) -> None:
        self._taken = dict(taken)
        self._singles: dict[int, None] = {}
        self._pairs: list[int] = []
        self._paired = pairs
        used = {slot + more for slot, size in taken.items() for more in range(size)}
        for slot in reversed(range(count)):
            if slot not in used:
                self._free(slot)

    @property
    def whole(self) -> int:
        """Slots of a block that is not coded."""
        return 2 if self._paired else 1

    @property
    def singles(self) -> int:
        """Free slots beside which there is a block."""
        return len(self._singles)

    def take(self, size: int) -> int | None:
        """Return the first of `size` free slots, which are taken then; None if there are none that fit."""
        if size == 1 and self._singles:
            slot = self._singles.popitem()[0]
        elif self._pairs:
            slot = self._pairs.pop()
            if size == 1:
                self._singles[slot + 1] = None
        else:
            return None
        self._taken[slot] = size
        return slot

    def size(self, slot: int) -> int:
        """Return how many slots the block in `slot` has."""
        return self._taken[slot]

    def give(self, slot: int) -> None:
        """The block in `slot` is there no more."""
        if self._taken.pop(slot) == 2:
            self._pairs.append(slot)
        else:
            self._free(slot)

    def beside(self, slot: int) -> int | None:
        """Return the slot that makes a pair with the one that a coded block had in `slot`, if a block has it."""
        other = slot ^ 1
        return other if self._paired and other in self._taken else None

    def _free(self, slot: int) -> None:
        other = slot ^ 1
        if self._paired and other in self._singles:
            del self._singles[other]
            self._pairs.append(min(slot, other))
        else:
            self._singles[slot] = None
