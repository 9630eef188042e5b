"""Where prompt tokens came from, by what the engines' own tables tell of their imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from bench.pools.reach import Reach
from transport.table.reader import TableReader
from transport.table.tiers import host_memory_of, is_tier


@dataclass(frozen=True, slots=True)
class Sources:
    """Tokens that replicas took from their own regions of host memory, from others' regions, from others' KV caches."""

    own_region: int = 0
    other_regions: int = 0
    caches: int = 0

    def since(self, before: Self) -> Sources:
        """Return what was added since `before`."""
        return Sources(*(getattr(self, each.name) - getattr(before, each.name) for each in fields(self)))

    def out_of_reach(self, reach: Reach) -> int:
        """Return how many of them an arm should not have had."""
        return {Reach.POOL: 0, Reach.CACHES: self.other_regions, Reach.NOTHING: self.other_regions + self.caches}[reach]


def sources_of(tables: Mapping[str, TableReader]) -> Sources:
    """Add up what the replicas among `tables` imported so far."""
    own = others = caches = 0
    for replica, table in tables.items():
        if is_tier(replica):
            continue
        for peer in table.peers():
            tokens = peer.blocks * table.block_size
            if peer.name == host_memory_of(replica):
                own += tokens
            elif is_tier(peer.name):
                others += tokens
            else:
                caches += tokens
    return Sources(own, others, caches)


def pool_tokens(tables: Mapping[str, TableReader]) -> int:
    """Return how many tokens all regions of host memory hold together."""
    return sum(table.num_blocks * table.block_size for name, table in tables.items() if is_tier(name))
