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
_NUMBERS = (
    "tag",
    "arrived_ns",
    "asked_ns",
    "scheduled_ns",
    "first_token_ns",
    "prompt_tokens",
    "local_tokens",
    "peer_tokens",
    "computed_tokens",
    "import_ns",
    "import_wait_ns",
    "import_bytes",
    "planned_tokens",
    "stale_blocks",
    "failed_blocks",
)
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

    def read(self, after: int) -> tuple[int, npt.NDArray[np.uint64]]:
        """Return the newest record's number, and the rows after number `after` that could be read whole, shape (n, WORDS).

        A number that was not reached yet is one of an earlier epoch: everything is returned then.
        """
        head = int(self._head[0])
        if head == after:
            return head, np.empty((0, WORDS), np.uint64)
        fence()
        first = max(after if after < head else 0, head - self._size)
        numbers = np.arange(first + 1, head + 1, dtype=np.uint64)
        slots = ((numbers - np.uint64(1)) % np.uint64(self._size)).astype(np.int64)
        before = self._rows[slots, 0]
        fence()
        rows = self._rows[slots]
        fence()
        whole = (before == numbers) & (self._rows[slots, 0] == numbers)
        return head, rows[whole]


def delivery(words: list[int], sources: list[str]) -> Delivery | None:
    """Return a row as a Delivery, `sources` being the names of the table's peers; None if it names what there is not."""
    *numbers, source, reason = words[1:]
    if source > len(sources) or reason >= len(REASONS):
        return None
    return Delivery(
        **dict(zip(_NUMBERS, numbers, strict=True)), source=sources[source - 1] if source else "", why=REASONS[reason]
    )
