"""What the replicas serve, in their own words: their answer to GET /v1/models, kept until the fleet changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.fleet import FleetView
from gateway.errors import NoReplicaReady, UnknownModel
from gateway.upstream.pool import Upstream, UpstreamLost

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModels:
    """One replica's list: `raw` is its answer as it came, `cards` its models by id, in its order."""

    raw: bytes
    cards: Mapping[str, Mapping[str, Any]]
    context_tokens: int | None = None

    def card(self, name: str) -> Mapping[str, Any]:
        """The model's card. Raises UnknownModel, which lists what is served."""
        card = self.cards.get(name)
        if card is None:
            raise UnknownModel(name, self.cards)
        return card


def parse_models(raw: bytes) -> ServedModels:
    """The list in `raw`. Raises msgspec.MsgspecError, KeyError or TypeError when it is not vLLM's."""
    cards = {card["id"]: card for card in msgspec.json.decode(raw)["data"]}
    lengths = [length for card in cards.values() if isinstance(length := card.get("max_model_len"), int)]
    return ServedModels(raw, cards, min(lengths, default=None))


class ModelsCache:
    """The newest known list. It is renewed in the background, so only the first caller ever waits for a replica."""

    def __init__(self, fleet: FleetView, upstream: Upstream) -> None:
        self._fleet = fleet
        self._upstream = upstream
        self._models: ServedModels | None = None
        self._version: int | None = None
        self._renewal: asyncio.Task[None] | None = None

    @property
    def known(self) -> ServedModels | None:
        """The known list, None until a replica has given one."""
        return self._models

    async def current(self) -> ServedModels:
        """The known list, or else the first one. Raises NoReplicaReady when no replica has given one."""
        renewal = self._renew()
        if self._models is None and renewal is not None:
            await asyncio.shield(renewal)
        if self._models is None:
            raise NoReplicaReady
        return self._models

    def lists(self, name: object) -> bool:
        """Whether the list at hand has a model of that name. A list that is out of date is renewed in the background."""
        self._renew()
        return self._models is not None and name in self._models.cards

    async def card(self, name: str) -> Mapping[str, Any]:
        """The card of a model, looked up anew before it is refused. Raises UnknownModel and NoReplicaReady."""
        models = await self.current()
        if name not in models.cards and (renewal := self._renew()) is not None:
            await asyncio.shield(renewal)
            models = await self.current()
        return models.card(name)

    def _renew(self) -> asyncio.Task[None] | None:
        """The renewal under way, started when the fleet is not the one that the list is from; None: up to date."""
        if self._renewal is not None and not self._renewal.done():
            return self._renewal
        if self._version == self._fleet.snapshot().version:
            return None
        self._renewal = asyncio.create_task(self._ask_replicas())
        return self._renewal

    async def _ask_replicas(self) -> None:
        snapshot = self._fleet.snapshot()
        for replica in snapshot.ready():
            try:
                self._models = parse_models(await self._upstream.get_bytes(replica, "/v1/models"))
            except (UpstreamLost, msgspec.MsgspecError, KeyError, TypeError) as error:
                _logger.warning("no list of models from %s: %s", replica.name, error)
                self._fleet.suspect(replica.name)
                continue
            self._version = snapshot.version
            return

    async def close(self) -> None:
        """End a renewal under way."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
