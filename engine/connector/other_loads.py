"""What another connector loads, beside ours in vLLM's MultiConnector: of that ours is told nothing, but has to find it out.

A request's blocks behind what vLLM found of it in its own cache are new to it. If ours loads nothing into them, either the
request's first step computes them, or another connector fills them: before that step, if the request has none now, or with it,
if the step begins behind them.
"""

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Blocks
from typing import Any

from engine.connector.sequence import NULL_BLOCK
from engine.connector.vllm_groups import ModelGroups

GroupBlocks = Blocks[Blocks[int]]


class OtherLoads:
    """The loads of other connectors that are under way, of a model with these KV cache groups."""

    def __init__(self, groups: ModelGroups) -> None:
        self._groups = groups
        self._found: dict[str, int] = {}
        self.given: dict[str, Any] = {}
        """The requests that were `admitted` since the last step."""
        self.under_way: dict[str, list[int]] = {}
        """The blocks of the loads that began before their requests' first steps."""

    def found(self, request_id: str, tokens: int) -> None:
        """vLLM found so many tokens of a request in its own cache, and asks who has more."""
        self._found[request_id] = tokens

    def ours(self, request_id: str) -> None:
        """Our own import fills the request's blocks."""
        self._found.pop(request_id, None)

    def admitted(self, request_id: str, blocks: Any) -> None:
        """vLLM gave a request `blocks`, its `KVCacheBlocks`, and has nothing loaded into them by us."""
        self.given[request_id] = blocks

    def begun(self, scheduled: Collection[str]) -> list[list[int]]:
        """Return the blocks of the loads that begin with a step, in which the requests that wait for one have no place."""
        begun = []
        for request_id, blocks in self.given.items():
            if request_id not in scheduled:
                ordered = self._groups.ordered(blocks.get_block_ids())
                self.under_way[request_id] = self._behind(ordered, self._found.pop(request_id, 0))
                begun.append(self.under_way[request_id])
        self.given.clear()
        return begun

    def loaded(self, request_id: str, ordered: GroupBlocks, computed: int) -> list[int]:
        """Return the blocks of a load that is part of a step, which begins with `computed` tokens of a request."""
        self.under_way.pop(request_id, None)
        found = self._found.pop(request_id, computed)
        if not any(found // group.block_size < computed // group.block_size for group in self._groups.groups):
            return []
        return self._behind(ordered, found, computed)

    def spoilt(self, invalid: set[int], held: Iterable[GroupBlocks]) -> set[int]:
        """Return the `invalid` blocks, whose load failed, that a step has used, and those behind them in the lists `held`.

        vLLM (0.32 and 0.33, v1/core/sched/scheduler.py, _update_requests_with_invalid_blocks) has them computed again, but not
        for a request that was preempted meanwhile, nor all of one that shares them and whose step is under way. Those of a load
        that is under way no step has used: there vLLM goes on from the first that failed.
        """
        used = invalid.difference(*self.under_way.values())
        spoilt = set(used)
        for blocks in (blocks for groups in held for blocks in groups) if used else ():
            first = next((place for place, block in enumerate(blocks) if block in used), len(blocks))
            spoilt.update(blocks[first:])
        return spoilt - {NULL_BLOCK}

    def ended(self, finished: Iterable[str]) -> None:
        """The loads of these requests are over."""
        for request_id in finished:
            self.under_way.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """The request ended."""
        self._found.pop(request_id, None)
        self.given.pop(request_id, None)
        self.under_way.pop(request_id, None)

    def _behind(self, ordered: GroupBlocks, found: int, end: int | None = None) -> list[int]:
        """Return a request's blocks of its tokens from `found` to `end`; of groups that do not need all blocks those before
        them too, as vLLM may have found fewer of them."""
        parts = []
        for group, blocks in zip(self._groups.groups, ordered, strict=True):
            first = found // group.block_size if group.kind == "full" else 0
            parts.append(blocks[first : None if end is None else -(-end // group.block_size)])
        return [block for part in parts for block in part if block != NULL_BLOCK]
