"""One index over all holders: under which keys who holds a block, as a set of bits. Pure.

A look-up costs as much as the *set* of holders changes along a chain, whatever their number: where it is the same at both ends
of a stretch, it is the same in between, since holders evict the end of a chain before its front. That is verified at evenly
spread places; between them a missing block may go unseen, as in `TableReader.held_blocks`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

PROBES = 16
"""Evenly spread places of a chain at which sets are looked up in any case."""
STEPS_MAX = 64
"""Different lengths that a look-up tells exactly, longest first: whoever holds less is told with a bound from below."""
SETS_KEPT_MAX = 1 << 16

Lengths = list[tuple[int, int]]
"""Sets of holders, as bits, each with how many leading blocks of a chain they hold; the longest first."""


class HolderIndex:
    """Knows a key by its first word of 8 bytes: to confuse two is a wrong prediction, which no import believes.

    A holder is a place, the number of its bit; `take_place` gives the lowest that is free. Belongs to one thread.
    """

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._again: Counter[tuple[int, int]] = Counter()
        self._sets: dict[int, int] = {}
        self._taken = 0

    def __len__(self) -> int:
        """Return how many keys somebody holds."""
        return len(self._holders)

    def take_place(self) -> int:
        """Return a place that nobody has."""
        free = ~self._taken
        bit = free & -free
        self._taken |= bit
        return bit.bit_length() - 1

    def free_place(self, place: int) -> None:
        """Give a place back, of which every key was removed."""
        self._taken &= ~(1 << place)

    def add(self, place: int, lows: Sequence[int]) -> None:
        """The holder has one more block under each of the keys with these first words."""
        bit, holders = 1 << place, self._holders
        bit = self._sets.setdefault(bit, bit)
        sets, known = self._sets, holders.get
        for low in lows:
            before = known(low)
            if before is None:
                holders[low] = bit
            elif before & bit:  # it has a second block of the same content
                self._again[place, low] += 1
            else:
                both = before | bit
                holders[low] = sets.setdefault(both, both)
        if len(sets) > SETS_KEPT_MAX:  # they only save memory
            sets.clear()

    def remove(self, place: int, lows: Sequence[int]) -> None:
        """The holder has one block less under each of these keys."""
        bit, holders, again = 1 << place, self._holders, self._again
        sets, known = self._sets, holders.get
        for low in lows:
            before = known(low, 0)
            if not before & bit:
                continue
            if again and (place, low) in again:
                again[place, low] -= 1
                if not again[place, low]:
                    del again[place, low]
                continue
            left = before ^ bit
            if left:
                holders[low] = sets.setdefault(left, left)
            else:
                del holders[low]

    def held(self, place: int, low: int) -> bool:
        """Tell whether a holder has the block under the key with this first word."""
        return bool(self._holders.get(low, 0) >> place & 1)

    def lengths(self, words: memoryview, among: int, begin: int = 0) -> Lengths:
        """Return who of `among` (bits) holds how many blocks of a chain from block `begin` on, nobody without any.

        `words` are the chain's keys, two uint64 each. Lengths count from the chain's begin.
        """
        blocks, known = len(words) // 2, self._holders.get
        if begin >= blocks:
            return []
        first = known(words[2 * begin], 0) & among
        if not first:
            return []
        stops = [(begin, first)]
        step = max(1, (blocks - begin) // PROBES)
        for place in range(begin + step, blocks, step):
            here = known(words[2 * place], 0) & stops[-1][1]
            stops.append((place, here))
            if not here:
                break
        last, here = stops[-1]
        if here and last < blocks - 1:
            here &= known(words[2 * blocks - 2], 0)
            stops.append((blocks - 1, here))
        found: Lengths = [(here, blocks)] if here else []
        for (low, holds), (high, holds_then) in zip(stops[-2::-1], stops[:0:-1], strict=True):
            if holds != holds_then:
                self._between(words, low, holds, high, holds_then, found)
        return found

    def _between(self, words: memoryview, low: int, holds: int, high: int, holds_then: int, found: Lengths) -> None:
        """Find where those end that hold block `low` and not block `high`; the longest first."""
        known = self._holders.get
        waiting = [(low, holds, high, holds_then)]
        while waiting:
            low, holds, high, holds_then = waiting.pop()
            if high - low == 1 or len(found) >= STEPS_MAX:
                found.append((holds & ~holds_then, low + 1))
                continue
            middle = (low + high) // 2
            here = known(words[2 * middle], 0) & holds | holds_then
            if here != holds:
                waiting.append((low, holds, middle, here))
            if here != holds_then:
                waiting.append((middle, here, high, holds_then))


def places(bits: int) -> Iterator[int]:
    """Yield the places in a set, the lowest first."""
    while bits:
        bit = bits & -bits
        yield bit.bit_length() - 1
        bits ^= bit
