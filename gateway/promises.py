"""Prefixes that replicas compute right now: what a request that comes next may find there.

A chain's key stands for all before it, so two chains agree up to some block and nowhere behind it. That block is
found by halving.
"""

from collections.abc import Iterable, Mapping
from itertools import islice

import msgspec

from gateway.chain import Chain

EXAMINED_MAX = 32
"""Requests in flight that are compared with a new one; the oldest that share the longest prefix by powers of two."""


class Promise(msgspec.Struct, frozen=True, gc=False):
    """`tokens` leading tokens of a prompt will be held once the request `tag` has its first token, at about `ready_at`."""

    tokens: int
    tag: int
    ready_at: float


class _Computed(msgspec.Struct, frozen=True, gc=False, eq=False):
    replica: str
    chain: Chain
    block_size: int
    ready_at: float


class Promises:
    """The chains of requests in flight, found by their keys at depths that are powers of two. Belongs to one thread."""

    def __init__(self) -> None:
        self._computed: dict[int, _Computed] = {}
        self._anchors: dict[int, dict[int, None]] = {}

    def add(self, tag: int, replica: str, chain: Chain, block_size: int, ready_at: float) -> None:
        """A replica was asked to compute the blocks of `chain`."""
        if not chain.anchors:
            return
        self._computed[tag] = _Computed(replica, chain, block_size, ready_at)
        anchors = self._anchors
        for key in chain.anchors:
            tags = anchors.get(key)
            if tags is None:
                anchors[key] = {tag: None}
            else:
                tags[tag] = None

    def remove(self, tag: int) -> None:
        """The request has its first token, or ended without one. Idempotent."""
        computed = self._computed.pop(tag, None)
        if computed is None:
            return
        for key in computed.chain.anchors:
            tags = self._anchors[key]
            tags.pop(tag, None)
            if not tags:
                del self._anchors[key]

    def find(self, chain: Chain, block_size: int) -> Mapping[str, Promise]:
        """For each replica, the longest prefix of `chain` that it computes now; of equal ones what is ready first."""
        found: dict[str, Promise] = {}
        if not self._computed:
            return found
        anchors, known = chain.anchors, self._anchors
        for power in range(len(anchors) - 1, -1, -1):
            tags = known.get(anchors[power])
            if tags is not None:
                self._compare(chain, block_size, tags, 1 << power, found)
                break
        return found

    def _compare(self, chain: Chain, block_size: int, tags: Iterable[int], least: int, found: dict[str, Promise]) -> None:
        """Put into `found` what the requests `tags` share with `chain`: `least` blocks, and less than twice as many."""
        most = min(2 * least - 1, chain.blocks) * block_size
        for tag in islice(tags, EXAMINED_MAX):
            computed = self._computed[tag]
            if computed.block_size != block_size:
                continue
            known = found.get(computed.replica)
            if known is not None and known.tokens == most and known.ready_at <= computed.ready_at:
                continue
            tokens = shared_blocks(computed.chain, chain, least) * block_size
            if known is None or tokens > known.tokens or (tokens == known.tokens and computed.ready_at < known.ready_at):
                found[computed.replica] = Promise(tokens, tag, computed.ready_at)


def shared_blocks(ours: Chain, theirs: Chain, least: int = 0) -> int:
    """Return how many leading blocks two chains have in common.

    `least` is a depth up to which they are known to agree; it is that of an anchor, and they do not agree at twice that depth.
    """
    mine, other = ours.words, theirs.words
    low, high = least, min(ours.blocks, theirs.blocks)
    if least:
        high = min(high, 2 * least - 1)
    if high > low and mine[2 * high - 2] == other[2 * high - 2] and mine[2 * high - 1] == other[2 * high - 1]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if mine[2 * middle - 2] == other[2 * middle - 2] and mine[2 * middle - 1] == other[2 * middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
