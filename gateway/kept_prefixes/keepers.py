"""The keepers of several fleets as one: a prefix is kept by the replicas of its model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from gateway.kept_prefixes.book import KeptPrefix, UnknownPrefix
from gateway.kept_prefixes.keeper import Keeper
from gateway.kept_prefixes.shapes import FlushedPrefixes, PrefixRemoved, PrefixRequest


class Keepers:
    """`place` tells which of the keepers is a model's; it raises UnknownModel."""

    def __init__(self, keepers: Sequence[Keeper], place: Callable[[str], Awaitable[int]]) -> None:
        self._keepers = tuple(keepers)
        self._place = place

    async def keep(self, wanted: PrefixRequest) -> KeptPrefix:
        """As Keeper's. Raises UnknownModel too."""
        return await self._keepers[await self._place(wanted.model)].keep(wanted)

    async def undo(self, prefix_id: str) -> PrefixRemoved:
        """As Keeper's. Raises UnknownPrefix."""
        for keeper in self._keepers:
            if any(kept.id == prefix_id for kept in keeper.all()):
                return await keeper.undo(prefix_id)
        raise UnknownPrefix(prefix_id)

    def flushed(self, emptied: Iterable[str], tried: Iterable[str]) -> FlushedPrefixes:
        """As Keeper's."""
        emptied, tried = list(emptied), list(tried)
        found = [keeper.flushed(emptied, tried) for keeper in self._keepers]
        return FlushedPrefixes(kept=sum(each.kept for each in found), renewed=sum(each.renewed for each in found))
