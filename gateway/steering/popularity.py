"""How often prefixes are currently requested: a fading count by key, at depths that are powers of two."""

from collections import OrderedDict
from math import exp, inf

from gateway.block_registry.chain import Chain

FADE_SECONDS = 20.0
"""A request counts 1/e after this many seconds."""


class Popularity:
    """Rates of at most `prefixes_max` prefixes; the least recently requested are dropped first. Times are in seconds."""

    def __init__(self, prefixes_max: int) -> None:
        self._prefixes_max = prefixes_max
        self._counts: OrderedDict[int, tuple[float, float]] = OrderedDict()

    def note(self, chain: Chain, now: float, beyond: int = 0, since: float = inf) -> tuple[int, int, float]:
        """Count a request with the keys of `chain`. Return about how many of its leading blocks were requested before.

        The first number is for any earlier time, the second for `since` or later; each is 0 unless it is more than `beyond`.
        The third is when those of the first were requested last, infinity if it is 0.

        Blocks are known at depths that are powers of two: an earlier request is assumed to end half-way to the next one.
        """
        counts, last, faded = self._counts, now, 1.0
        depth, formerly, lately, formerly_at = 1, 0, 0, inf
        for key in chain.anchors:
            known = counts.get(key)
            if known is None:
                counts[key] = (1.0, now)
            else:
                count, at = known
                if depth > beyond:
                    formerly, formerly_at = depth, at
                    if at >= since:
                        lately = depth
                if at != last:  # most keys of a prompt were last requested together
                    last = at
                    faded = exp((at - now) / FADE_SECONDS)
                counts[key] = (1.0 + count * faded, now)
                counts.move_to_end(key)
            depth *= 2
        while len(counts) > self._prefixes_max:
            counts.popitem(last=False)
        return _halfway(formerly, chain.blocks), _halfway(lately, chain.blocks), formerly_at

    def rate(self, chain: Chain, blocks: int, now: float) -> float:
        """Return the requests per second that begin with the first `blocks` of `chain`, or with at most half of that prefix."""
        for key in reversed(chain.anchors[: blocks.bit_length()]):
            known = self._counts.get(key)
            if known is not None:
                count, at = known
                return count * exp((at - now) / FADE_SECONDS) / FADE_SECONDS
        return 0.0


def _halfway(depth: int, blocks: int) -> int:
    """Between `depth` and the next one, or the end of a chain of `blocks`."""
    return (depth + min(2 * depth - 1, blocks)) // 2 if depth else 0
