"""The requests that wait for their first step, by the gateway's tags, in a block table's first page.

A request that is listed when its engine ends was given no step and no import, so it cannot be what ended it. Whoever is not
listed may have been. The area is a plain array of words, each a tag or 0: one writer, any number of readers, no lock, since a
tag is written and removed in one word and its place means nothing.
"""

from collections import Counter
from typing import Any

WAITING_OFFSET = 1024
"""Where the area begins in the table, bytes. It ends with the page of 4,096."""
SLOTS = 384


class WaitingArea:
    """The owner's side: `words` is the table's first page as uint64."""

    def __init__(self, words: Any) -> None:
        self._words = words
        self._free = [WAITING_OFFSET // 8 + slot for slot in reversed(range(SLOTS))]
        self._slots: dict[int, int] = {}
        self._open: Counter[int] = Counter()

    def add(self, tag: int) -> None:
        """List a request that arrived, if there is room. Choices of one request share its tag: only the first one lists it."""
        self._open[tag] += 1
        if tag and self._open[tag] == 1 and self._free:
            slot = self._slots[tag] = self._free.pop()
            self._words[slot] = tag

    def begin(self, tag: int) -> None:
        """A step or an import is about to be given to it: it is listed no longer."""
        slot = self._slots.pop(tag, None)
        if slot is not None:
            self._words[slot] = 0
            self._free.append(slot)

    def remove(self, tag: int) -> None:
        """A request that had been added ended."""
        self._open[tag] -= 1
        if self._open[tag] <= 0:
            del self._open[tag]
            self.begin(tag)


def listed(page: memoryview) -> tuple[int, ...]:
    """Return all tags that are listed; `page` is the table's first page as uint64."""
    first = WAITING_OFFSET // 8
    return tuple(tag for tag in page[first : first + SLOTS].tolist() if tag)


def waits(page: memoryview, tag: int) -> bool:
    """Return whether `tag` is listed; `page` is the table's first page as uint64."""
    first = WAITING_OFFSET // 8
    return tag != 0 and tag in page[first : first + SLOTS].tolist()
