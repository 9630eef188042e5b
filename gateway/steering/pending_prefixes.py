"""Prefixes that replicas are computing right now, which the next request may find there.

So 50 equal prompts that come at once are computed once, or once on each replica where waiting would take longer. A key stands
for everything before it, so two chains agree up to some block and nowhere after it. Bisection finds that block.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Protocol

from gateway.block_registry.chain import Chain

EXAMINED_MAX = 32
"""In-flight requests compared with a new one: the oldest that share the longest prefix, by powers of two."""


class Computed(Protocol):
    """A request sent to a replica; `chain` has the keys of its prompt's blocks of `block_size` tokens."""

    @property
    def tag(self) -> int: ...
    @property
    def replica(self) -> str: ...
    @property
    def chain(self) -> Chain | None: ...
    @property
    def block_size(self) -> int: ...


class Promises:
    """In-flight requests by the keys of their chains at depths that are powers of two. Belongs to one thread."""

    def __init__(self) -> None:
        self._anchors: dict[int, dict[int, Computed]] = {}

    def __len__(self) -> int:
        return len(self._anchors)

    def add(self, request: Computed) -> None:
        """A replica was asked to compute the blocks of the request's chain."""
        anchors, tag = self._anchors, request.tag
        for key in request.chain.anchors if request.chain is not None else ():
            sharing = anchors.get(key)
            if sharing is None:
                anchors[key] = {tag: request}
            else:
                sharing[tag] = request

    def remove(self, request: Computed) -> None:
        """The request has its first token, or ended without one. Idempotent."""
        anchors, tag = self._anchors, request.tag
        for key in request.chain.anchors if request.chain is not None else ():
            sharing = anchors.get(key)
            if sharing is not None:
                sharing.pop(tag, None)
                if not sharing:
                    del anchors[key]

    def find(self, chain: Chain, block_size: int) -> Mapping[str, int]:
        """Return, for each replica that is computing a prefix of `chain`, the tokens of the longest one."""
        found: dict[str, int] = {}
        anchors, known = chain.anchors, self._anchors
        for power in range(len(anchors) - 1, -1, -1) if known else ():
            sharing = known.get(anchors[power])
            if sharing is not None:
                _compare(chain, block_size, sharing.values(), 1 << power, found)
                break
        return found


def _compare(chain: Chain, block_size: int, requests: Iterable[Computed], least: int, found: dict[str, int]) -> None:
    """Add to `found` what `requests` have in common with `chain`: at least `least` blocks, and less than twice as many."""
    most = min(2 * least - 1, chain.blocks) * block_size
    for request in islice(requests, EXAMINED_MAX):
        if request.block_size != block_size or request.chain is None:
            continue
        known = found.get(request.replica, 0)
        if known < most:
            tokens = shared_blocks(request.chain, chain, least) * block_size
            if tokens > known:
                found[request.replica] = tokens


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
