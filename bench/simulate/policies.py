"""Policies that need no block tables: what other routers do, for comparison."""

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.simulate.jobs import Job
from bench.simulate.traces import TraceRequest


@dataclass(frozen=True, slots=True)
class Choice:
    """Send the request to `replica`; it may import up to `import_tokens_max` of its prompt from `source`."""

    replica: int
    source: int | None = None
    import_tokens_max: int | None = None
    planned_tokens: int = 0


class Policy(Protocol):
    """Picks replicas. For each request that was placed, the other methods are called once each, in this order."""

    def choose(self, job: Job, now: float) -> Choice:
        """Pick for a request that has just arrived."""

    def first_byte(self, job: Job, now: float) -> None:
        """Its first token has arrived."""

    def finished(self, job: Job, now: float) -> None:
        """Its answer is complete."""


@dataclass(slots=True)
class _Forgetful:
    def first_byte(self, job: Job, now: float) -> None:
        """Nothing is learnt from it."""

    def finished(self, job: Job, now: float) -> None:
        """Nothing is learnt from it."""


@dataclass(slots=True)
class Random(_Forgetful):
    """Any replica."""

    replicas: int
    seed: int = 0
    _chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def choose(self, job: Job, now: float) -> Choice:
        """Draw one."""
        return Choice(self._chance.randrange(self.replicas))


@dataclass(slots=True)
class RoundRobin(_Forgetful):
    """One after the other."""

    replicas: int
    _turn: int = -1

    def choose(self, job: Job, now: float) -> Choice:
        """The next one."""
        self._turn = (self._turn + 1) % self.replicas
        return Choice(self._turn)


@dataclass(slots=True)
class StickyHash(_Forgetful):
    """The replica that the request's session hashes to."""

    replicas: int

    def choose(self, job: Job, now: float) -> Choice:
        """By Knuth's multiplicative hash of the session."""
        return Choice((job.request.session * 2654435761 % 2**32) * self.replicas >> 32)


class InFlight:
    """How many requests this router has with each replica."""

    __slots__ = ("counts",)

    def __init__(self, replicas: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros(replicas, dtype=np.int64)

    def least(self) -> int:
        """The replica with the fewest, the first of them."""
        return int(self.counts.argmin())


class LeastLoad:
    """The replica with the fewest requests of this router's."""

    def __init__(self, replicas: int) -> None:
        self._in_flight = InFlight(replicas)

    def choose(self, job: Job, now: float) -> Choice:
        """The least busy replica."""
        replica = self._in_flight.least()
        self._in_flight.counts[replica] += 1
        return Choice(replica)

    def first_byte(self, job: Job, now: float) -> None:
        """Nothing changes: the answer is still under way."""

    def finished(self, job: Job, now: float) -> None:
        """One fewer."""
        self._in_flight.counts[job.replica] -= 1


@dataclass(frozen=True, slots=True)
class TreeSettings:
    """The cache-aware policy's settings; these are the defaults of vllm-router's and sglang-router's command lines.

    Sources: vllm-project/router, py_src/vllm_router/router_args.py, and src/main.rs (0.3, 64, 1.5, 120 s, 2**26 characters).
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    eviction_interval_seconds: float = 120.0
    tree_tokens_max: int = 2**26 // 4  # of each replica, at four characters a token


LIBRARY_TREE = TreeSettings(0.5, 32, 1.1, 30.0, 10_000 // 4)
"""The defaults of the same policy as a library: vllm-project/router, src/policies/mod.rs, CacheAwareConfig."""


class CacheAwareTree:
    """vllm-router's `cache_aware` (src/policies/cache_aware.rs, src/tree.rs), which is sglang-router's.

    A tree of the prompts it has sent, each node with the replicas they went to. If the most and the fewest requests in flight
    differ by more than both thresholds, the least busy replica gets the request. Else, if more than `cache_threshold` of the
    prompt is in the tree, the replica that was last sent through the deepest matching node; else the least busy. What
    engines evict is not seen; the tree forgets its own least recently used parts.

    Blocks stand for the text of the real tree: a block's name implies all blocks before it, so a flat dict is that tree.
    """

    def __init__(self, replicas: int, block_tokens: int, settings: TreeSettings) -> None:
        self._in_flight = InFlight(replicas)
        self._settings = settings
        self._block_tokens = block_tokens
        self._blocks_max = settings.tree_tokens_max // block_tokens
        self._last: dict[int, list[int]] = {}
        self._used: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(replicas)]
        self._evicts = settings.eviction_interval_seconds

    def choose(self, job: Job, now: float) -> Choice:
        """The least busy replica if the load is unbalanced or the prefix unknown; otherwise the prefix's replica."""
        if now >= self._evicts:
            self._evicts = now + self._settings.eviction_interval_seconds
            self._evict()
        counts, request = self._in_flight.counts, job.request
        most, fewest = int(counts.max()), int(counts.min())
        replica = self._in_flight.least()
        imbalanced = (
            most - fewest > self._settings.balance_abs_threshold and most > fewest * self._settings.balance_rel_threshold
        )
        if not imbalanced:
            depth = self._match(request.blocks)
            matched = min(depth * self._block_tokens, request.prompt_tokens)
            if depth and matched / request.prompt_tokens > self._settings.cache_threshold:
                replica = self._last[request.blocks[depth - 1]][-1]
        self._insert(request, replica)
        counts[replica] += 1
        return Choice(replica)

    def first_byte(self, job: Job, now: float) -> None:
        """Nothing changes: the answer is still under way."""

    def finished(self, job: Job, now: float) -> None:
        """One fewer."""
        self._in_flight.counts[job.replica] -= 1

    def _match(self, blocks: Sequence[int]) -> int:
        last = self._last
        return next((depth for depth, block in enumerate(blocks) if block not in last), len(blocks))

    def _insert(self, request: TraceRequest, replica: int) -> None:
        used, last = self._used[replica], self._last
        for block in reversed(request.blocks):
            used[block] = None
            used.move_to_end(block)
            owners = last.setdefault(block, [])
            if owners and owners[-1] == replica:
                continue
            if replica in owners:
                owners.remove(replica)
            owners.append(replica)

    def _evict(self) -> None:
        for replica, used in enumerate(self._used):
            while len(used) > self._blocks_max:
                block, _ = used.popitem(last=False)
                owners = self._last[block]
                owners.remove(replica)
                if not owners:
                    del self._last[block]


PolicyMaker = Callable[[int, int, int], Policy]
"""Makes a policy from (replicas, tokens of a trace's block, seed)."""

FIELD_POLICIES: dict[str, PolicyMaker] = {
    "random": lambda replicas, block_tokens, seed: Random(replicas, seed),
    "round-robin": lambda replicas, block_tokens, seed: RoundRobin(replicas),
    "least-load": lambda replicas, block_tokens, seed: LeastLoad(replicas),
    "sticky-hash": lambda replicas, block_tokens, seed: StickyHash(replicas),
    "tree": lambda replicas, block_tokens, seed: CacheAwareTree(replicas, block_tokens, TreeSettings()),
    "tree-library": lambda replicas, block_tokens, seed: CacheAwareTree(replicas, block_tokens, LIBRARY_TREE),
}
"""The policies of other routers, by their names on the command line."""
