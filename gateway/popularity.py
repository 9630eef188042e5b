"""How often prefixes are asked for now: a count of requests that fades, by key, at depths that are powers of two."""

from collections import OrderedDict
from math import exp

from gateway.promises import anchor_depths
from transport.keys import Keys

FADE_SECONDS = 20.0
"""A request counts 1/e after this time."""


class Popularity:
    """Rates of at most `prefixes_max` prefixes, the least recently asked for out first. Times are in seconds."""

    def __init__(self, prefixes_max: int) -> None:
        self._prefixes_max = prefixes_max
        self._counts: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def note(self, keys: Keys, now: float) -> None:
        """A request with `keys`, shape (n, 2), came."""
        counts = self._counts
        for depth in anchor_depths(len(keys)):
            key = int(keys[depth - 1, 0])
            count, at = counts.pop(key, (0.0, now))
            counts[key] = (1.0 + count * exp((at - now) / FADE_SECONDS), now)
        while len(counts) > self._prefixes_max:
            counts.popitem(last=False)

    def rate(self, keys: Keys, blocks: int, now: float) -> float:
        """Requests a second that begin with the first `blocks` of `keys`, or with what is at most half of that prefix."""
        for depth in reversed(anchor_depths(min(blocks, len(keys)))):
            known = self._counts.get(int(keys[depth - 1, 0]))
            if known is not None:
                count, at = known
                return count * exp((at - now) / FADE_SECONDS) / FADE_SECONDS
        return 0.0
