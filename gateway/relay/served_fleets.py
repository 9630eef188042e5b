"""The fleets behind one front door, one for each model, and which of them a request is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

import msgspec

from engine.fleet import FleetView
from gateway.errors import NoReplicaReady, Unavailable, UnknownModel
from gateway.prompts.prompt_reader import KnownPrompt
from gateway.relay.admission import Admission
from gateway.relay.going_on import GoingOn
from gateway.relay.interfaces import AttemptRecorder, PlannerLike, PlanT
from gateway.upstream.served_models import ModelsCache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedFleet(Generic[PlanT]):
    """The replicas of one model, and who plans and records what they are asked.

    `names` are those that its settings give the model: its replicas may have more, such as adapters, which they tell. `ranked`:
    its engines schedule by priority.
    """

    fleet: FleetView
    models: ModelsCache
    planner: PlannerLike[PlanT]
    recorder: AttemptRecorder[PlanT]
    going_on: GoingOn[PlanT] | None = None
    admission: Admission | None = None
    ranked: bool = False
    names: frozenset[str] = frozenset()


class ServedFleets(Generic[PlanT]):
    """At least one. The first one gets what names no model."""

    def __init__(self, fleets: Sequence[ServedFleet[PlanT]]) -> None:
        self.all = tuple(fleets)
        self.first = self.all[0]
        self._several = len(self.all) > 1
        self._configured = frozenset[str]().union(*(each.names for each in self.all))

    def at_hand(self, model: str) -> ServedFleet[PlanT]:
        """The fleet of a model as far as is known at once, by the settings before all else; the first one where it is not."""
        if not self._several or not model:
            return self.first
        for each in self.all:
            if model in each.names:
                return each
        return next((each for each in self.all if each.models.lists(model)), self.first)

    async def find(self, model: str) -> ServedFleet[PlanT]:
        """The fleet that has a model, asked anew before it is refused. Raises UnknownModel and NoReplicaReady."""
        likely = self.at_hand(model)
        if not self._several or model in likely.names:
            await likely.models.card(model)
            return likely
        for each in self.all:
            try:
                await each.models.card(model)
            except (UnknownModel, NoReplicaReady):
                continue
            return each
        raise UnknownModel(model, self._known())

    def place(self, model: str) -> int:
        """Which of them has a model as far as is known at once, by its place; 0 for "". Raises UnknownModel."""
        found = self.at_hand(model)
        if model and not found.models.lists(model) and model not in found.names:
            raise UnknownModel(model, self._known())
        return self.all.index(found)

    async def find_place(self, model: str) -> int:
        """As `place`, asked anew before it is refused. Raises UnknownModel and NoReplicaReady."""
        return self.all.index(await self.find(model)) if model and self._several else 0

    def prompt_read_for(self, fleet: ServedFleet[PlanT], prompt: KnownPrompt, place: int) -> KnownPrompt:
        """The prompt, which was read for the fleet at `place`. Raises Unavailable if that is not the `fleet` that serves it."""
        if self.all[place] is not fleet:  # its replicas told of the model in the meantime
            raise Unavailable("The model has just become known here. Send the request again.")
        return prompt

    async def listed(self, allowed: Sequence[str] = ()) -> bytes:
        """The body of GET /v1/models, of the `allowed` ones if any are named. Raises NoReplicaReady."""
        if not self._several and not allowed:
            return (await self.first.models.current()).raw
        cards: dict[str, Any] = {}
        for each in self.all:
            try:
                for name, card in (await each.models.current()).cards.items():
                    if self._is_found_by(name, each):
                        cards.setdefault(name, card)
            except NoReplicaReady:
                continue
        if not cards:
            raise NoReplicaReady
        shown = [card for name, card in cards.items() if not allowed or name in allowed]
        return msgspec.json.encode({"object": "list", "data": shown})

    def names(self) -> list[list[str]]:
        """The names by which `at_hand` finds each one: those in its settings, and what else its replicas told."""
        found = []
        for each in self.all:
            told = () if each.models.known is None else each.models.known.cards
            found.append([*sorted(each.names), *(name for name in told if name not in self._configured)])
        return found

    def _is_found_by(self, name: str, fleet: ServedFleet[PlanT]) -> bool:
        """Whether a name that its replicas told of is not another model's by the settings."""
        return name in fleet.names or name not in self._configured

    def _known(self) -> list[str]:
        return list(dict.fromkeys(name for names in self.names() for name in names))
