"""Before a request is planned: what disk and vault have of its prompt is brought up, if that is sooner than computing it.

A request waits no longer than computing what it lacks would take, and never longer than a bound. What came up is in a table by
then, so planning finds it like anything else that somebody holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Protocol

import msgspec
from pydantic import Field

from engine.frame_tiers.messages import Promoted, TierStats
from gateway.block_registry.chain import Chain
from gateway.block_registry.fleet_state import FleetState, TableKind
from gateway.block_registry.registry import LookUp
from gateway.steering.costs.model import CostModel, ModelKey

UNANSWERED_MAX = 3
"""After so many requests in a row that waited in vain, further ones do not wait for a while."""
QUIET_SECONDS_MIN, QUIET_SECONDS_MAX = 5.0, 60.0


class Tiers(Protocol):
    """What is needed of an `engine.frame_tiers.client.TierClient`."""

    @property
    def latest(self) -> TierStats | None: ...
    async def promote(self, fingerprint: bytes, keys: bytes, begin: int, seconds: float, *, lossy: bool) -> Promoted | None: ...
    def pin(self, number: int, chains: Iterable[tuple[bytes, bytes]], seconds: float) -> None: ...
    def unpin(self, number: int) -> None: ...
    async def flush(self) -> dict[str, str]: ...
    def warnings(self) -> list[str]: ...


class NoTiers:
    """There is neither disk nor vault."""

    latest: TierStats | None = None

    async def promote(self, fingerprint: bytes, keys: bytes, begin: int, seconds: float, *, lossy: bool) -> Promoted | None:
        return None

    def pin(self, number: int, chains: Iterable[tuple[bytes, bytes]], seconds: float) -> None:
        pass

    def unpin(self, number: int) -> None:
        pass

    async def flush(self) -> dict[str, str]:
        return {}

    def warnings(self) -> list[str]:
        return []


class Promotion(msgspec.Struct, frozen=True, gc=False):
    """What came of asking for one request: `source` holds its prompt up to `tokens`, "" and `why` if it does not."""

    source: str
    tokens: int
    seconds: float
    why: str = ""


@dataclass(slots=True)
class PromotionCounts:
    """What was asked of disk and vault since the gateway's start."""

    asked: Annotated[int, Field(description="requests that waited for disk and vault")] = 0
    brought: Annotated[int, Field(description="of these, requests for which something came up")] = 0
    tokens: Annotated[int, Field(description="prompt tokens that came up for them")] = 0
    too_slow: Annotated[int, Field(description="requests that did not wait, as computing was expected sooner")] = 0
    seconds: Annotated[float, Field(description="time that requests waited")] = 0.0


class Promotions:
    """Asks `tiers` for what the replicas lack, `costs` whether that pays. Belongs to the event loop's thread."""

    def __init__(
        self, tiers: Tiers, costs: CostModel, wait_seconds_max: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.tiers = tiers
        self.counts = PromotionCounts()
        self._costs = costs
        self._wait_seconds_max = wait_seconds_max
        self._clock = clock
        self._unanswered = 0
        self._quiet_until = 0.0

    @property
    def active(self) -> bool:
        """Whether there is anybody to ask."""
        if self._wait_seconds_max <= 0 or self.tiers.latest is None or not self.tiers.latest.stores:
            return False
        return not self._quiet_until or self._clock() >= self._quiet_until

    async def bring_up(
        self,
        state: FleetState,
        look_up: LookUp,
        tokens: int,
        keys: Mapping[str, ModelKey],
        wanted: str | None,
        *,
        lossy: bool = False,
    ) -> Promotion | None:
        """Bring up what the ready replicas, or the `wanted` one, lack of a prompt of `tokens`; None if nobody was asked.

        `lossy`: its caller accepts loss.
        """
        found: Promotion | None = None
        seconds_left = self._wait_seconds_max  # for all kinds together
        for kind, (chain, block_size) in zip(state.kinds, look_up.chains, strict=True):
            takers = [name for name in state.ready if name in kind.tables and (wanted is None or name == wanted)]
            if takers and chain.blocks and seconds_left > 0:
                key = keys[takers[0]]
                came = await self._of_kind(kind, takers, chain, block_size, look_up, tokens, key, seconds_left, lossy=lossy)
                if came is not None:
                    seconds_left -= came.seconds
                    found = came if came.source or found is None else found
        return found

    async def _of_kind(
        self,
        kind: TableKind,
        takers: list[str],
        chain: Chain,
        block_size: int,
        look_up: LookUp,
        tokens: int,
        key: ModelKey,
        seconds_max: float,
        *,
        lossy: bool,
    ) -> Promotion | None:
        local = max(look_up.blocks.get(name, 0) for name in takers)
        reached = max(local, *(look_up.tiers[name][1] if name in look_up.tiers else 0 for name in takers))
        reached = max(reached, *(look_up.blocks.get(name, 0) for name in kind.tables))
        if reached >= chain.blocks:
            return None
        begin, whole = local * block_size, chain.blocks * block_size
        model = self._costs.model(key)
        spared = model.computing(reached * block_size, tokens)[0] - model.computing(whole, tokens)[0]
        if spared <= self._price(key, whole - begin):
            self.counts.too_slow += 1
            return None
        began = self._clock()
        answer = await self.tiers.promote(kind.fingerprint, chain.raw, begin, min(seconds_max, spared), lossy=lossy)
        waited = self._clock() - began
        self.counts.asked += 1
        self.counts.seconds += waited
        self._heard(answer is not None)
        if answer is None or not answer.source:
            return Promotion("", 0, waited, answer.why if answer is not None else "no answer in time")
        self.counts.brought += 1
        self.counts.tokens += answer.tokens - begin
        if answer.frames:
            self._costs.observe_promotion(answer.source.partition(".")[0], key.device, answer.tokens - begin, waited, began)
        return Promotion(answer.source, answer.tokens, waited)

    def _heard(self, answered: bool) -> None:
        """A process that hangs, as on a disk that does, must not hold every request up."""
        if answered:
            self._unanswered, self._quiet_until = 0, 0.0
            return
        self._unanswered += 1
        more = self._unanswered - UNANSWERED_MAX
        if more >= 0:
            self._quiet_until = self._clock() + min(QUIET_SECONDS_MIN * 2.0 ** min(more, 10), QUIET_SECONDS_MAX)

    def _price(self, key: ModelKey, tokens: int) -> float:
        """Seconds that the nearest store takes for so many tokens."""
        latest = self.tiers.latest
        names = [store.name for store in latest.stores] if latest is not None else []
        return min((self._costs.promotion_seconds(name, key.device, tokens) for name in names), default=0.0)
