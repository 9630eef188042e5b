"""Tags by which the engines' records find the requests that they tell of."""

import os

DRAWN = 64
"""So many are drawn at a time: a call into the kernel takes as long as ten of the rest."""
_BYTES = 8


class Tags:
    """Numbers from 1 to 2**62 that nobody can guess."""

    def __init__(self) -> None:
        self._drawn: list[int] = []

    def next(self) -> int:
        """Return one that was not returned before, for all that chance allows."""
        if not self._drawn:
            self._drawn = memoryview(os.urandom(DRAWN * _BYTES)).cast("Q").tolist()
        return (self._drawn.pop() >> 2) + 1
