"""Prefixes that replicas compute right now: what a request that comes next may find there.

A chain's key stands for all before it, so two chains agree up to some block and nowhere behind it. That block is
found by halving.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping

import msgspec

from transport.keys import Keys

EXAMINED_MAX = 32
"""Requests in flight that are compared with a new one; the oldest that share the longest prefix by powers of two."""


class Promise(msgspec.Struct, frozen=True, gc=False):
    """`tokens` leading tokens of a prompt will be held once the request `tag` has its first token, at about `ready_at`."""

    tokens: int
    tag: int
    ready_at: float


class _Chain(msgspec.Struct, frozen=True, gc=False, eq=False):
    replica: str
    keys: Keys
    block_size: int
    ready_at: float


class Promises:
    """The chains of requests in flight, found by their keys at depths that are powers of two. Belongs to one thread."""

    def __init__(self) -> None:
        self._chains: dict[int, _Chain] = {}
        self._anchors: dict[int, OrderedDict[int, None]] = {}

    def add(self, tag: int, replica: str, keys: Keys, block_size: int, ready_at: float) -> None:
        """A replica was asked to compute the blocks of `keys`, shape (n, 2)."""
        if not len(keys):
            return
        self._chains[tag] = _Chain(replica, keys, block_size, ready_at)
        for depth in anchor_depths(len(keys)):
            self._anchors.setdefault(int(keys[depth - 1, 0]), OrderedDict())[tag] = None

    def remove(self, tag: int) -> None:
        """The request has its first token, or ended without one. Idempotent."""
        chain = self._chains.pop(tag, None)
        if chain is None:
            return
        for depth in anchor_depths(len(chain.keys)):
            key = int(chain.keys[depth - 1, 0])
            tags = self._anchors[key]
            tags.pop(tag, None)
            if not tags:
                del self._anchors[key]

    def find(self, keys: Keys, block_size: int) -> Mapping[str, Promise]:
        """For each replica, the longest prefix of `keys` that it computes now; of equal ones what is ready first."""
        found: dict[str, Promise] = {}
        if not self._chains:
            return found
        for depth in reversed(anchor_depths(len(keys))):
            tags = self._anchors.get(int(keys[depth - 1, 0]))
            if tags is None:
                continue
            for tag in _first(tags, EXAMINED_MAX):
                chain = self._chains[tag]
                if chain.block_size != block_size:
                    continue
                promise = Promise(shared_blocks(chain.keys, keys) * block_size, tag, chain.ready_at)
                known = found.get(chain.replica)
                if known is None or (-promise.tokens, promise.ready_at) < (-known.tokens, known.ready_at):
                    found[chain.replica] = promise
            break
        return found


def anchor_depths(blocks: int) -> list[int]:
    """Return the depths, in blocks from 1, at which a chain of that many blocks is indexed: the powers of two."""
    return [1 << power for power in range(blocks.bit_length())]


def shared_blocks(ours: Keys, theirs: Keys) -> int:
    """Return how many leading blocks two chains have in common."""
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if ours[middle - 1, 0] == theirs[middle - 1, 0] and ours[middle - 1, 1] == theirs[middle - 1, 1]:
            low = middle
        else:
            high = middle - 1
    return low


def _first(tags: OrderedDict[int, None], count: int) -> Iterator[int]:
    for place, tag in enumerate(tags):
        if place == count:
            return
        yield tag
