"""The ring of delivery records in a block table: one writer, any number of readers, no lock.

A record is a row of words; the first is its number, from 1 on. It is 0 while the row is written, and the number comes last, so
that a reader that finds the number it expects before and after its copy has the whole record. Only then is `head`, the number
of the newest, raised. A reader that is overtaken misses records, and can tell how many.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from transport.deliveries import REASONS, Delivery
from transport.fence import fence

DELIVERIES = 4096
_NUMBERS = Delivery.__struct_fields__[:-2]  # all but `source` and `why`
WORDS = 1 + len(_NUMBERS) + 2
"""Words of 8 bytes in a row: its number, the numbers of a Delivery, the place of its source plus 1, the place of its reason."""

_REASON_INDEX = {reason: index for index, reason in enumerate(REASONS)}


class DeliveryRing:
    """`head` is uint64 (1,), `rows` uint64 (n, WORDS), both in the table's memory; only the owner calls `write`."""

    def __init__(self, head: npt.NDArray[np.uint64], rows: npt.NDArray[np.uint64]) -> None:
        self._head: Any = head
        self._rows: Any = rows
        self._size = len(rows)

    def write(self, delivery: Delivery, source: int) -> None:
        """Append a record; `source` is the place of the delivery's source among the table's peers, -1 for none."""
        number = int(self._head[0]) + 1
        slot = (number - 1) % self._size
        words = [getattr(delivery, name) for name in _NUMBERS]
        words += (source + 1, _REASON_INDEX[delivery.why])
        self._rows[slot, 0] = 0
        fence()
        self._rows[slot, 1:] = np.array(words, np.uint64)
        fence()
        self._rows[slot, 0] = number
        fence()
        self._head[0] = number

    def read(self, after: int) -> tuple[int, list[list[int]]]:
        """Return the newest record's number, and the rows of WORDS words after number `after` that could be read whole.

        A number that was not reached yet is one of an earlier epoch: everything is returned then.
        """
        head = int(self._head[0])
        if head == after:
            return head, []
        fence()
        first = max(after if after < head else 0, head - self._size)
        if head - first == 1:
            return head, self._read_one(head)
        numbers = np.arange(first + 1, head + 1, dtype=np.uint64)
        slots = ((numbers - np.uint64(1)) % np.uint64(self._size)).astype(np.int64)
        before = self._rows[slots, 0]
        fence()
        rows = self._rows[slots]
        fence()
        whole = (before == numbers) & (self._rows[slots, 0] == numbers)
        return head, rows[whole].tolist()

    def _read_one(self, number: int) -> list[list[int]]:
        """The usual case, at a third of the time."""
        slot = (number - 1) % self._size
        before = self._rows[slot, 0]
        fence()
        words: list[int] = self._rows[slot].tolist()
        fence()
        return [words] if before == number and self._rows[slot, 0] == number else []


def source_place(words: list[int]) -> int:
    """Return the place of a row's source among the table's peers, from 1 on; 0 for none."""
    return words[-2]


def delivery(words: list[int], sources: list[str]) -> Delivery | None:
    """Return a row as a Delivery, `sources` being the names of the table's peers; None if it names what there is not."""
    *numbers, source, reason = words[1:]
    if source > len(sources) or reason >= len(REASONS):
        return None
    values: list[Any] = [*numbers, sources[source - 1] if source else "", REASONS[reason]]
    return Delivery(*values)
