"""Which blocks a tier should take, and which should give way in it: policies replayed over recorded traces, without an engine.

A cache that gives up its least recently used block, as vLLM does, hands what it gives up to a tier with one of these policies:

- lru: the least recently stored or restored block gives way;
- popularity: the one that was asked for least often, aged as GreedyDual does (Cao and Irani, 1997);
- sketch: as popularity, by the estimates and the queues of a replica's host memory (engine/tiers);
- price: the one that is cheapest to compute again, aged likewise: a block costs more the farther it is from its prompt's start;
- second: as lru, but once it is full, it takes only what was asked for at least twice.

Printed are the shares of all blocks that came from the cache and from the tier, and blocks stored for each block asked for.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np

from engine.tiers.ask_counts import AskCounts
from engine.tiers.giving_way import GivingWay

PRICE_BY_DEPTH = 0.05
"""What a block costs more than its predecessor, as a part of the first one's cost."""
SIZES = ((500, 1000), (500, 4000), (2000, 4000), (2000, 16000), (4000, 40000))
"""Blocks of the cache and of the tier."""


class Policy(Protocol):
    """A tier of blocks."""

    def __contains__(self, block: int) -> bool: ...
    def take(self, block: int) -> bool:
        """Store a block that the cache gave up, or note that it is here; return whether it was stored."""
        ...

    def restored(self, block: int) -> None:
        """Note that a block of it was used."""
        ...


class Lru:
    """The least recently used block gives way; with `uses`, none does for one that was asked for once."""

    def __init__(self, size: int, uses: Counter[int] | None = None) -> None:
        self._size, self._uses = size, uses
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block: int) -> bool:
        return block in self._blocks

    def take(self, block: int) -> bool:
        """See Policy."""
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return False
        if len(self._blocks) >= self._size:
            if self._uses is not None and self._uses[block] < 2:
                return False
            self._blocks.popitem(last=False)
        self._blocks[block] = None
        return True

    def restored(self, block: int) -> None:
        """See Policy."""
        self._blocks.move_to_end(block)


class GreedyDual:
    """The block of the least value gives way; a value counts from that of the last one that gave way, so old ones fade."""

    def __init__(self, size: int, values: Counter[int] | dict[int, float]) -> None:
        self._size, self._values = size, values
        self._worth: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []
        self._level = 0.0

    def __contains__(self, block: int) -> bool:
        return block in self._worth

    def take(self, block: int) -> bool:
        """See Policy."""
        fresh = block not in self._worth
        if fresh and len(self._worth) >= self._size:
            self._drop()
        self.restored(block)
        return fresh

    def restored(self, block: int) -> None:
        """See Policy."""
        worth = self._worth[block] = self._level + self._values[block]
        heapq.heappush(self._heap, (worth, block))

    def _drop(self) -> None:
        while True:
            worth, block = heapq.heappop(self._heap)
            if self._worth.get(block) == worth:  # else it was used since
                del self._worth[block]
                self._level = worth
                return


class Sketch:
    """What engine/tiers/host_memory.py does, without its copies; `blocks` are numbered from 0."""

    def __init__(self, size: int, blocks: int) -> None:
        self._keys = np.random.default_rng(0).integers(0, 1 << 63, (blocks, 2), np.uint64)
        self._asks, self._blocks = AskCounts(size), GivingWay({})
        self._free = list(range(size))

    def __contains__(self, block: int) -> bool:
        return self._keys[block].tobytes() in self._blocks

    def asked(self, blocks: Sequence[int]) -> None:
        """Count a request's blocks."""
        self._asks.add(self._keys[blocks])

    def take(self, block: int) -> bool:
        """See Policy."""
        key, asked = self._keys[block].tobytes(), int(self._asks.of(self._keys[block : block + 1])[0])
        if key in self._blocks:
            self._blocks.used(key, asked)
            return False
        slot = self._free.pop() if self._free else self._blocks.pop()
        if slot is not None:
            self._blocks.put(key, slot, asked)
        return slot is not None

    def restored(self, block: int) -> None:
        """See Policy."""
        self._blocks.used(self._keys[block].tobytes(), 1 + int(self._asks.of(self._keys[block : block + 1])[0]))


def replay(requests: Sequence[Sequence[int]], cache_blocks: int, tier_blocks: int, policy: str) -> tuple[float, float, float]:
    """Return the shares of blocks that came from the cache and from the tier, and the stores for each block asked for."""
    uses: Counter[int] = Counter()
    prices: dict[int, float] = {}
    tier = _made(policy, tier_blocks, uses, prices, 1 + max(map(max, requests)))
    cache: OrderedDict[int, None] = OrderedDict()
    asked = local = restored = stored = 0
    for blocks in requests:
        asked += len(blocks)
        begun = True
        for depth, block in enumerate(blocks):
            uses[block] += 1
            prices[block] = 1 + PRICE_BY_DEPTH * depth
            begun = begun and (block in cache or block in tier)
            local += begun and block in cache
            if begun and block not in cache:
                restored += 1
                tier.restored(block)
        if isinstance(tier, Sketch):
            tier.asked(blocks)
        for block in reversed(blocks):  # vLLM gives up a prompt's last block first
            if block not in cache and len(cache) >= cache_blocks:
                stored += tier.take(cache.popitem(last=False)[0])
            cache[block] = None
            cache.move_to_end(block)
    return local / asked, restored / asked, stored / asked


def _made(policy: str, size: int, uses: Counter[int], prices: dict[int, float], blocks: int) -> Policy:
    match policy:
        case "lru":
            return Lru(size)
        case "second":
            return Lru(size, uses)
        case "popularity":
            return GreedyDual(size, uses)
        case "sketch":
            return Sketch(size, blocks)
        case "price":
            return GreedyDual(size, prices)
        case _:
            raise ValueError(f"no policy {policy}")


def run(traces: Sequence[Path]) -> None:
    """Replay each trace, JSON lines with `hash_ids`, and print a table."""
    names = ("lru", "popularity", "sketch", "price", "second")
    print("| trace | cache, blocks | tier, blocks | from the cache |" + "".join(f" {name} | stored |" for name in names))
    print("|---|---|---|---|" + "---|---|" * len(names))
    for trace in traces:
        requests = [msgspec.json.decode(line)["hash_ids"] for line in trace.read_bytes().splitlines()]
        for cache, tier in SIZES:
            found = [replay(requests, cache, tier, name) for name in names]
            cells = "".join(f" {restored:.3f} | {stored:.2f} |" for _, restored, stored in found)
            print(f"| {trace.stem} | {cache} | {tier} | {found[0][0]:.3f} |{cells}", flush=True)
