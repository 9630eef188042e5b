"""The ring of delivery records in a block table: one writer, any number of readers, no lock.

A record is a row of words; the first is its number, from 1 on. It is 0 while the row is written, and the number comes last, so
that a reader that finds the number it expects before and after its copy has the whole record. Only then is `head`, the number
of the newest, raised. A reader that is overtaken misses records, but knows how many.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transport.table.deliveries import FURTHER_TOKENS_MAX, REASONS, SOURCES_MAX, Delivery, FromSource
from transport.table.fence import fence

DELIVERIES = 4096
_NUMBERS = Delivery.__struct_fields__[:-3]  # all but `source`, `why` and `further`
_FURTHER = SOURCES_MAX - 1
_TOKEN_BITS = 32
WORDS = 1 + len(_NUMBERS) + _FURTHER + 2
"""Words of 8 bytes in a row: its number, the numbers of a Delivery, one for each further source, the place of its source plus
1, the place of its reason. That of a further source is its place plus 1 and, in the lower half, its tokens; 0 for none."""

Row = tuple[int, ...]
_load = struct.Struct(f"={WORDS}Q").unpack_from
_REASON_INDEX = {reason: index for index, reason in enumerate(REASONS)}


class DeliveryRing:
    """`head` is uint64 (1,), `rows` uint64 (n, WORDS), both in the table's memory. Only the owner has one."""

    def __init__(self, head: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint64]) -> None:
        self._head: Any = head
        self._rows: Any = rows
        self._size = len(rows)

    def write(self, delivery: Delivery, source: int, further: Sequence[int] = ()) -> None:
        """Append a record; `source` is the place of the delivery's source among the table's peers, -1 for none, and `further`
        are those of its further sources. Raises ValueError if these, or their tokens, are too many.
        """
        if len(further) > _FURTHER or any(not 0 <= each.tokens <= FURTHER_TOKENS_MAX for each in delivery.further):
            raise ValueError("more sources, or tokens from one, than can be")
        number = int(self._head[0]) + 1
        slot = (number - 1) % self._size
        words = [getattr(delivery, name) for name in _NUMBERS]
        words += (place + 1 << _TOKEN_BITS | each.tokens for place, each in zip(further, delivery.further, strict=True))
        words += (0,) * (_FURTHER - len(further))
        words += (source + 1, _REASON_INDEX[delivery.why])
        self._rows[slot, 0] = 0
        fence()
        self._rows[slot, 1:] = np.array(words, np.uint64)
        fence()
        self._rows[slot, 0] = number
        fence()
        self._head[0] = number


class RingReader:
    """The same ring as others read it: `head` is one word, `rows` n * WORDS words, both in the table's memory.

    `load` copies WORDS words out of `rows`, from an offset in bytes.
    """

    def __init__(self, head: memoryview, rows: memoryview, load: Callable[[memoryview, int], Row] = _load) -> None:
        self._head = head
        self._rows = rows
        self._size = len(rows) // WORDS
        self._load = load

    def read(self, after: int) -> tuple[int, list[Row]]:
        """Return the newest record's number, and the rows of WORDS words after number `after` that could be read whole.

        A number that was not reached yet is one of an earlier epoch: everything is returned then.
        """
        head, rows = self._head[0], self._rows
        whole: list[Row] = []
        if head == after:
            return head, whole
        fence()
        number = after if after < head else 0
        if head - number > self._size:
            number = head - self._size
        while number < head:
            number += 1
            start = (number - 1) % self._size * WORDS
            before = rows[start]
            fence()
            words = self._load(rows, 8 * start)
            fence()
            if before == number and rows[start] == number:
                whole.append(words)
        return head, whole


def delivery(words: Row, names: Callable[[], list[str]]) -> Delivery | None:
    """Return a row as a Delivery; `names` are those of the table's peers. None if the row names one that does not exist."""
    place, reason = words[-2], words[-1]
    numbers: Any = words[1 : -2 - _FURTHER]
    if not place and not reason:  # nothing was imported, nothing missed
        return Delivery(*numbers)
    source, further = "", tuple[FromSource, ...]()
    if place:
        sources, more = names(), words[-2 - _FURTHER : -2]
        if max(place, *(word >> _TOKEN_BITS for word in more)) > len(sources):
            return None
        source = sources[place - 1]
        if more[0]:
            further = tuple(FromSource(sources[(word >> _TOKEN_BITS) - 1], word & FURTHER_TOKENS_MAX) for word in more if word)
    if reason >= len(REASONS):
        return None
    values: Any = (*numbers, source, REASONS[reason], further)
    return Delivery(*values)
