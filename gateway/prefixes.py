"""Which prefixes are asked for most: a bounded count over block keys. The prompts themselves are never kept.

A prompt is counted at some depths only (16,384 tokens at 46 of 1,024 blocks), for it happens on each request.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec
from pydantic import BaseModel, Field

from gateway.chain import Chain
from gateway.prefix_shapes import KeptPrefixAnswer
from transport.keys import KEY_BYTES

DEPTHS_MAX = 128
"""Depths at which a prompt is counted, at most: enough for 16 million blocks."""


def _all_depths() -> list[int]:
    depths = [1]
    while len(depths) < DEPTHS_MAX:
        depths.append(depths[-1] + max(1, depths[-1] // 8))
    return depths


_DEPTHS = _all_depths()
_SPANS = tuple(slice(depth * KEY_BYTES - KEY_BYTES, depth * KEY_BYTES) for depth in reversed(_DEPTHS))
"""Where the key of each depth is, from the last one to the first."""


def counted_depths(blocks: int) -> list[int]:
    """Return the depths up to `blocks` at which prompts are counted: each one up to 16, then steps of an eighth at most.

    The depths of a prompt are those of any longer one too, so what prompts have in common is counted at the same keys.
    """
    return _DEPTHS[: bisect_right(_DEPTHS, blocks)]


class _Block(msgspec.Struct, gc=False, eq=False):
    depth: int
    block_size: int
    parent: bytes
    requests: int
    last_used: float


class Prefix(BaseModel):
    """One prefix that requests had in common."""

    key: str = Field(description="key of its last block, 32 hex digits")
    tokens: int = Field(description="its length in tokens, in whole blocks; of a long one up to an eighth is left out")
    requests: int = Field(description="requests that began with it")
    last_used: float = Field(description="Unix time of the last of them, seconds")
    holders: list[str] = Field(description="replicas that hold its last block now")


class PrefixReport(BaseModel):
    """The body of GET /kv/prefixes."""

    tracked_blocks: int = Field(description="block keys counted now")
    tracked_blocks_max: int = Field(description="bound on them; the least recently used go first")
    prefixes: list[Prefix] = Field(description="most requested first")
    kept: list[KeptPrefixAnswer] = Field(default_factory=list, description="those of POST /kv/prefixes, oldest first")


class PrefixCounts:
    """Counts how many requests began with each block key, in at most `blocks_max` entries, least recently used out first."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def note(self, chain: Chain, block_size: int, now: float) -> None:
        """Count one request whose prompt has the keys of `chain`; `now` is Unix time in seconds."""
        blocks, raw = self._blocks, chain.raw
        find, move_to_end = blocks.get, blocks.move_to_end
        place = min(len(counted_depths(len(chain))), self._blocks_max)
        # From the end to the front, so that of a prefix the front is the last to be forgotten.
        for span in _SPANS[-place:] if place else ():
            place -= 1
            key = raw[span]
            block = find(key)
            if block is None:
                parent = raw[_SPANS[-place]] if place else b""
                blocks[key] = _Block(_DEPTHS[place], block_size, parent, 1, now)
            else:
                block.requests += 1
                block.last_used = now
                move_to_end(key)
        while len(blocks) > self._blocks_max:
            blocks.popitem(last=False)

    def top(self, count: int) -> list[tuple[bytes, int, int, float]]:
        """Return the most requested prefixes as (key, tokens, requests, last used), at most `count` of them.

        A prefix is left out when one that goes on from it was asked for as often: it says nothing more.
        """
        longest: dict[bytes, int] = {}
        for block in self._blocks.values():
            if block.requests > longest.get(block.parent, 0):
                longest[block.parent] = block.requests
        found = [
            (key, block.depth * block.block_size, block.requests, block.last_used)
            for key, block in self._blocks.items()
            if block.requests > longest.get(key, 0)
        ]
        found.sort(key=lambda entry: (-entry[2], -entry[1], -entry[3], entry[0]))
        return found[:count]

    def report(self, count: int, holders: Callable[[Sequence[bytes]], Sequence[Sequence[str]]]) -> PrefixReport:
        """Return the body of GET /kv/prefixes; `holders` tells for each key which replicas hold that block."""
        top = self.top(count)
        held = holders([key for key, *_ in top]) if top else []
        prefixes = [
            Prefix(key=key.hex(), tokens=tokens, requests=requests, last_used=last_used, holders=list(names))
            for (key, tokens, requests, last_used), names in zip(top, held, strict=True)
        ]
        return PrefixReport(tracked_blocks=len(self._blocks), tracked_blocks_max=self._blocks_max, prefixes=prefixes)
