"""Which prefixes are asked for most: a bounded count over block keys. The prompts themselves are never kept.

A prompt is counted at some depths only (16,384 tokens at 46 of 1,024 blocks), for it happens on each request.
"""

from bisect import bisect_right
from collections import OrderedDict

import msgspec

from gateway.block_registry.chain import Chain
from transport.keys import KEY_BYTES

DEPTHS_MAX = 128
"""Depths at which a prompt is counted, at most: enough for 16 million blocks."""
COUNTED_TOGETHER = 16
"""Requests that are collected before they are counted together."""


def _all_depths() -> list[int]:
    depths = [1]
    while len(depths) < DEPTHS_MAX:
        depths.append(depths[-1] + max(1, depths[-1] // 8))
    return depths


_DEPTHS = _all_depths()
"""Each one up to 16, then steps of an eighth at most. A prompt's are those of any longer one too, so that what prompts have in
common is counted at the same keys."""
_SPANS = tuple(slice(depth * KEY_BYTES - KEY_BYTES, depth * KEY_BYTES) for depth in _DEPTHS)
"""Where the key of each depth is."""


class _Block(msgspec.Struct, gc=False, eq=False):
    """`requests` ended here, as far as they are counted; those that went on are counted with one of its `children`.

    `turn` and `last_used` are those of the last one that ended here, or with a child that was forgotten.
    """

    depth: int
    block_size: int
    parent: bytes
    requests: int
    children: int
    turn: int
    last_used: float


class PrefixCounts:
    """Counts how many requests began with each block key, in at most `blocks_max` entries, least recently used out first.

    A request is counted at the last of its keys alone: that the keys before it were used too, the report works out. Some are
    counted together, while what that takes is in the processor's caches; all are before somebody looks.
    """

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self._turn = 0
        self._noted: list[tuple[Chain, int, float]] = []

    @property
    def blocks_max(self) -> int:
        """The bound on `len(self)`."""
        return self._blocks_max

    def __len__(self) -> int:
        self._count_noted()
        return len(self._blocks)

    def note(self, chain: Chain, block_size: int, now: float) -> None:
        """Count one request whose prompt has the keys of `chain`; `now` is Unix time in seconds."""
        self._noted.append((chain, block_size, now))
        if len(self._noted) >= COUNTED_TOGETHER:
            self._count_noted()

    def _count_noted(self) -> None:
        noted, self._noted = self._noted, []
        for chain, block_size, now in noted:
            self._count(chain, block_size, now)

    def _count(self, chain: Chain, block_size: int, now: float) -> None:
        place = min(bisect_right(_DEPTHS, chain.blocks), self._blocks_max) - 1
        if place < 0:
            return
        blocks, raw = self._blocks, chain.raw
        self._turn += 1
        key = raw[_SPANS[place]]
        block = blocks.get(key)
        if block is not None:
            block.requests += 1
            block.turn = self._turn
            block.last_used = now
            blocks.move_to_end(key)
            return
        requests, children = 1, 0
        while place >= 0 and block is None:
            parent = raw[_SPANS[place - 1]] if place else b""
            blocks[key] = _Block(_DEPTHS[place], block_size, parent, requests, children, self._turn, now)
            key, requests, children, place = parent, 0, 1, place - 1
            block = blocks.get(key)
        if block is not None:
            block.children += 1
        while len(blocks) > self._blocks_max:
            self._forget_one()

    def _forget_one(self) -> None:
        """Forget the key that was used longest ago, the last of its prefix; the one before it takes over what it counted."""
        blocks = self._blocks
        while True:
            key, block = blocks.popitem(last=False)
            if not block.children:
                break
            blocks[key] = block  # it was used when the last of its children was
        parent = blocks.get(block.parent)
        if parent is None:
            return
        parent.children -= 1
        parent.requests += block.requests
        if parent.turn <= block.turn:
            parent.turn, parent.last_used = block.turn, block.last_used
            if not parent.children:
                blocks.move_to_end(block.parent, last=False)

    def top(self, count: int) -> list[tuple[bytes, int, int, float]]:
        """Return the most requested prefixes as (key, tokens, requests, last used), at most `count` of them.

        A prefix is left out when one that goes on from it was asked for as often: it says nothing more.
        """
        self._count_noted()
        longest: dict[bytes, int] = {}
        sums: dict[bytes, tuple[int, int, float]] = {}
        found = []
        for key, block in sorted(self._blocks.items(), key=lambda entry: -entry[1].depth):
            requests, turn, last_used = sums.pop(key, (0, 0, 0.0))
            requests += block.requests
            if block.turn > turn:
                turn, last_used = block.turn, block.last_used
            if requests > longest.pop(key, 0):
                found.append((key, block.depth * block.block_size, requests, last_used))
            others, latest, at = sums.get(block.parent, (0, 0, 0.0))
            sums[block.parent] = (requests + others, *max((turn, last_used), (latest, at)))
            longest[block.parent] = max(requests, longest.get(block.parent, 0))
        found.sort(key=lambda entry: (-entry[2], -entry[1], -entry[3], entry[0]))
        return found[:count]
