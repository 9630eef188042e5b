"""How often prefixes are asked for now: a count of requests that fades, by key, at depths that are powers of two."""

from collections import OrderedDict
from math import exp

from gateway.chain import Chain

FADE_SECONDS = 20.0
"""A request counts 1/e after this time."""


class Popularity:
    """Rates of at most `prefixes_max` prefixes, the least recently asked for out first. Times are in seconds."""

    def __init__(self, prefixes_max: int) -> None:
        self._prefixes_max = prefixes_max
        self._counts: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def note(self, chain: Chain, now: float) -> None:
        """A request with the keys of `chain` came."""
        counts, last, faded = self._counts, now, 1.0
        for key in chain.anchors:
            known = counts.get(key)
            if known is None:
                counts[key] = (1.0, now)
                continue
            if known[1] != last:  # most keys of a prompt were last asked for together
                last = known[1]
                faded = exp((last - now) / FADE_SECONDS)
            counts[key] = (1.0 + known[0] * faded, now)
            counts.move_to_end(key)
        while len(counts) > self._prefixes_max:
            counts.popitem(last=False)

    def formerly(self, chain: Chain, blocks: int, since: float) -> int:
        """About how many leading blocks of `chain`, more than `blocks`, were asked for at `since` or later; 0 if no more were.

        They are known at depths that are powers of two: what was asked for ends half-way to the next one, for all we know.
        """
        for power in range(len(chain.anchors) - 1, -1, -1):
            depth = 1 << power
            if depth <= blocks:
                break
            known = self._counts.get(chain.anchors[power])
            if known is not None and known[1] >= since:
                return (depth + min(2 * depth - 1, len(chain))) // 2
        return 0

    def rate(self, chain: Chain, blocks: int, now: float) -> float:
        """Requests a second that begin with the first `blocks` of `chain`, or with what is at most half of that prefix."""
        for key in reversed(chain.anchors[: blocks.bit_length()]):
            known = self._counts.get(key)
            if known is not None:
                count, at = known
                return count * exp((at - now) / FADE_SECONDS) / FADE_SECONDS
        return 0.0
