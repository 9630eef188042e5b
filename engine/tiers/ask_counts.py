"""How often blocks were asked for lately, those included that are nowhere any more: a sketch of fixed size."""

import numpy as np
import numpy.typing as npt

from transport.keys import Keys

CELLS_PER_BLOCK = 32
"""Bytes in each of the two rows. With 8, so many keys share cells that on some traces a tier restores less than an LRU one."""
ASKS_PER_BLOCK = 16
"""All counts are halved when so many blocks were asked for, for each one that there is room for."""
COUNT_MAX = 255


class AskCounts:
    """Counts of block keys for a tier of `blocks`: a count-min sketch with conservative update (Estan and Varghese, 2002) that
    ages as TinyLFU's does (Einziger et al., ACM TOS 2017). The two halves of a key are its hashes.

    A count is an estimate: higher where a key shares both its cells with others.
    """

    def __init__(self, blocks: int) -> None:
        cells = 1 << (CELLS_PER_BLOCK * blocks - 1).bit_length()
        self._rows = np.zeros((2, cells), np.uint8)
        self._mask = np.uint64(cells - 1)
        self._asks_max = ASKS_PER_BLOCK * blocks
        self._asks = 0

    def add(self, keys: Keys) -> None:
        """Blocks under `keys`, shape (n, 2), all different, were asked for once more."""
        (row, other), (cells, others) = self._rows, self._cells(keys)
        counts, found = row.take(cells), other.take(others)
        more = np.minimum(counts, found)
        more += more < COUNT_MAX
        row[cells], other[others] = np.maximum(counts, more), np.maximum(found, more)
        self._asks += len(keys)
        if self._asks >= self._asks_max:
            self._asks = 0
            self._rows >>= 1

    def of(self, keys: Keys) -> npt.NDArray[np.uint8]:
        """Return how often each of `keys` was asked for, shape (n,); 1 of those that are not known."""
        (row, other), (cells, others) = self._rows, self._cells(keys)
        least: npt.NDArray[np.uint8] = np.minimum(row.take(cells), other.take(others))
        return np.maximum(least, 1, out=least)

    def _cells(self, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return (keys[:, 0] & self._mask).view(np.int64), (keys[:, 1] & self._mask).view(np.int64)
