"""From a request's body to a plan: which replica, importing from whom, with which token ids."""

import itertools
import time
from collections.abc import Callable, Mapping, Set
from functools import lru_cache
from math import inf
from typing import Any, Protocol

from engine.fleet import FleetView, Replica
from gateway.abreast import Abreast
from gateway.body import Endpoint
from gateway.chain import Chain
from gateway.costs import CostModel, ModelKey
from gateway.evictions import Evictions
from gateway.feed import DeliveryFeed
from gateway.flights import Flight, Flights
from gateway.hint import CHAT_IDS, hint, takes_chat_ids
from gateway.known_prompt import PromptReader
from gateway.load import FleetLoad
from gateway.parity import ParityCounts, ParityVerdict
from gateway.plan import Asked, Plan, SteeringCounts
from gateway.popularity import Popularity
from gateway.prefixes import PrefixCounts
from gateway.ready import ReadyReplicas
from gateway.registry import NOTHING, LookUp, Registry
from gateway.served_models import ServedModels
from gateway.steering import Candidate, Decision, PromptView, steer
from gateway.tables import Table, Tables
from gateway.tags import Tags
from gateway.tenants import TenantContext
from gateway.tokens import TokenService

AFFINITY_CHARS_MAX = 512
MODEL_KEYS_MAX = 1024
_NOBODY: frozenset[str] = frozenset()


class PlannerSettings(Protocol):
    """What the planner needs of the settings."""

    @property
    def prefixes_tracked_max(self) -> int: ...
    @property
    def tokenize_inline_chars_max(self) -> int: ...
    @property
    def key_cache_bytes_max(self) -> int: ...
    @property
    def send_chat_ids(self) -> bool: ...
    @property
    def imports(self) -> bool: ...


class Planner:
    """Plans requests for one fleet. Belongs to the event loop's thread.

    Call `started` without an await after `plan` or `replan`: the next plan then knows of this request.
    """

    def __init__(
        self,
        fleet: FleetView,
        tables: Tables,
        tokens: TokenService,
        settings: PlannerSettings,
        models: Callable[[], ServedModels | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ready = ReadyReplicas(fleet)
        self._send_chat_ids = settings.send_chat_ids
        self.registry = Registry(tables, settings.key_cache_bytes_max)
        self._imports = settings.imports
        self._reader = PromptReader(tokens, settings.tokenize_inline_chars_max, models)
        self._clock = clock
        self._abreast = Abreast()
        self._turns = itertools.count()
        self._tags = Tags()
        self._stood: tuple[Mapping[str, Replica], Mapping[str, Table], list[tuple[str, ModelKey, Table | None]]] = ({}, {}, [])
        self._names: list[str] = []
        self.costs = CostModel()
        self.load = FleetLoad()
        self._flights = Flights(self.load, self.costs, self.registry.refused)
        self.feed = DeliveryFeed(self.registry.tables)
        self.evictions = Evictions()
        self.feed.add(self._flights.delivered)
        self.feed.add(self.evictions.delivered)
        self._popularity = Popularity(settings.prefixes_tracked_max)
        self.parity_counts = ParityCounts()
        self.counts = SteeringCounts()
        self.prefixes = PrefixCounts(settings.prefixes_tracked_max)

    @property
    def parity(self) -> ParityVerdict:
        """Whether our token ids are the engines'."""
        return self._reader.parity

    @parity.setter
    def parity(self, verdict: ParityVerdict) -> None:
        self._reader.parity = verdict

    def adapter(self, body: Mapping[str, Any]) -> str:
        """The adapter that a request names, as keys spell it; "" for none."""
        return self._reader.adapter(body)

    async def plan(
        self, endpoint: Endpoint, body: Mapping[str, Any], tenant: TenantContext, *, pinned: str | None = None
    ) -> Plan:
        """Return a plan for the request, whose body stays as it is.

        `pinned` names the replica it has to go to. Raises ApiError: NoReplicaReady, UnknownReplica, ReplicaNotReady,
        PromptTooLong, InvalidRequest.
        """
        self._ready.now(pinned)
        known = await self._reader.read(endpoint, body)
        if self._flights.any:
            await self._abreast.wait()
        asked = Asked(
            known=known,
            salt=tenant.salt,
            lora=self.adapter(body),
            affinity=_affinity(body, tenant.salt),
            pinned=pinned,
            streamed=body.get("stream") is True,
            embeds=endpoint == "embeddings",
        )
        return self._decide(asked, frozenset(), first=True)

    def replan(self, plan: Plan, *, exclude: Set[str]) -> Plan:
        """Return another plan for the same request, on none of the replicas in `exclude`. Raises NoReplicaReady."""
        return self._decide(plan.asked, exclude)

    def started(self, plan: Plan) -> None:
        """The request is about to be sent."""
        self._flights.started(plan.flight, self._clock())

    def first_byte(self, plan: Plan) -> None:
        """The first byte of the replica's answer came, for streams that of the first event; further calls change nothing."""
        now, flight = self._clock(), plan.flight
        if flight.delivery is None:
            self.feed.poll(flight.replica)
        self._flights.first_byte(flight, now)

    def finished(self, plan: Plan) -> None:
        """The request ended there; call it once for each `started`."""
        flight = plan.flight
        if flight.delivery is None:
            self.feed.poll(flight.replica)
        self._flights.finished(flight, self._clock())

    def in_flight(self) -> Mapping[str, int]:
        """Requests with each replica now."""
        return self.load.in_flight()

    def _decide(self, asked: Asked, exclude: Set[str], *, first: bool = False) -> Plan:
        ready = self._ready.now(asked.pinned, exclude)
        now, known = self._clock(), asked.known
        tables = self.registry.tables()
        self._flights.listen_to(tables)
        self.feed.refresh(tables)
        look_up = usable = NOTHING
        if known.ids is not None:
            look_up = self.registry.look_up(known.ids, asked.salt, asked.lora, tables)
            if known.cacheable:
                usable = look_up
        candidates, held, computed = self._candidates(ready, asked, usable, tables, now)
        if first and look_up.chains:
            self._note(*look_up.chains[0], max(look_up.held_tokens_max, computed), now, missed=known.cacheable)
        view = self._view(asked, usable, held, now)
        decision = steer(view, candidates, self.costs, now, next(self._turns), self._names)
        plan = self._plan(asked, ready[decision.replica], decision, usable, tables, now)
        self.counts.count(plan)
        return plan

    def _candidates(
        self, ready: Mapping[str, Replica], asked: Asked, look_up: LookUp, tables: Mapping[str, Table], now: float
    ) -> tuple[list[Candidate], int, int]:
        """Return the ready replicas, and how many tokens of the prompt one of them holds and one of them computes at most."""
        promises: Mapping[str, int] = {}
        for chain, block_size in look_up.chains:
            promised = self.load.promised(chain, block_size)
            promises = {**promises, **promised} if promises else promised
        holdings, load, pinned, imports = look_up.holdings, self.load.load, asked.pinned, self._imports
        found = []
        held_most = computed_most = 0
        for name, key, table in self._standing(ready, tables):
            holding, promise, ahead, room = holdings.get(name), promises.get(name, 0), load(name, now), inf
            if table is not None:  # the null block and what is being decoded hold something without a key
                room = (table.num_blocks - 1 - table.cached_blocks() - ahead.decoding) * table.block_size
            held, sources = 0, _NOBODY
            if holding is not None:
                held = holding.blocks * holding.block_size
                if held > held_most:
                    held_most = held
                if imports:
                    sources = holding.exchanges_with
            if promise > computed_most:
                computed_most = promise
            transport = table.transport if table is not None else ""
            takes = pinned is None or pinned == name
            found.append(Candidate(name, held, ahead, sources, key, transport, promise, takes, "", room))
        return found, held_most, computed_most

    def _standing(self, ready: Mapping[str, Replica], tables: Mapping[str, Table]) -> list[tuple[str, ModelKey, Table | None]]:
        """Name, key and table of the replicas, worked out anew only when there are others, as their names in order are."""
        if ready is not self._stood[0] or tables is not self._stood[1]:
            found = []
            for name, replica in ready.items():
                table = tables.get(name)
                found.append((name, _model_key(replica, table), table))
            self._stood = (ready, tables, found)
            self._names = sorted(ready)
            self.evictions.caches({name: table.num_blocks * table.block_size for name, table in tables.items()})
            for name, table in tables.items():
                self.evictions.appeared(name, table)
        return self._stood[2]

    def _note(self, chain: Chain, block_size: int, at_hand: int, now: float, *, missed: bool) -> None:
        """Count a request, and learn what is `missed`: asked for before, beyond the tokens that are held or being computed."""
        missed = missed and at_hand < chain.blocks * block_size
        since = self.evictions.counts_since(now) if missed else inf
        formerly = self._popularity.note(chain, now, at_hand // block_size, since) * block_size
        if formerly > at_hand:
            self.evictions.missed(formerly - at_hand, at_hand)
        self.prefixes.note(chain, block_size, time.time())

    def _view(self, asked: Asked, look_up: LookUp, held: int, now: float) -> PromptView:
        rate, block_size = 0.0, 1
        if look_up.chains:
            chain, block_size = look_up.chains[0]
            if held:
                rate = self._popularity.rate(chain, held // block_size, now)
        again = self.evictions.again()
        return PromptView(asked.known.tokens, asked.affinity, rate, self.load.decode_seconds, block_size, again)

    def _plan(
        self, asked: Asked, replica: Replica, decision: Decision, look_up: LookUp, tables: Mapping[str, Table], now: float
    ) -> Plan:
        known, expected, name = asked.known, decision.expected, replica.name
        tag = self._tags.next()
        table = tables.get(name)
        holding = look_up.holdings.get(name)
        chain, block_size = look_up.chains[holding.chain] if holding is not None else (None, 0)
        cached = expected.local_tokens + expected.peer_tokens
        ready_in = expected.seconds
        flight = Flight(
            tag,
            name,
            decision.source,
            known.tokens,
            cached,
            now + ready_in,
            chain,
            block_size,
            _model_key(replica, table),
            self.load.load(name, now),
            table.transport if table is not None else "",
            now,
            ready_in,
            asked.streamed,
            known.count == 1 and not asked.embeds,
            table is not None and not asked.embeds,
        )
        params = None
        if flight.reports:
            held = holding.blocks * holding.block_size if holding is not None else 0
            params = hint(asked, decision, tag, held, imports=self._imports)
            if known.chat_ids and self._send_chat_ids and table is not None and takes_chat_ids(table):
                params[CHAT_IDS] = known.ids
        return Plan(
            replica=replica,
            decision=decision,
            tag=tag,
            prompt=known.sent,
            kv_transfer_params=params,
            cache_salt=asked.salt or None,
            prompt_tokens=known.tokens if known.ids is not None else 0,
            predicted_tokens=cached,
            held_tokens_max=look_up.held_tokens_max,
            flight=flight,
            asked=asked,
        )


@lru_cache(maxsize=MODEL_KEYS_MAX)
def _key_of(device: str, fingerprint: bytes) -> ModelKey:
    return ModelKey(device.partition(":")[0], fingerprint.hex()[:16])


def _model_key(replica: Replica, table: Table | None) -> ModelKey:
    """Whose prefill terms a replica has: its kind of device's, with the fingerprint for the model."""
    return _key_of(replica.device, table.fingerprint if table is not None else b"")


def _affinity(body: Mapping[str, Any], salt: str) -> str:
    """The request's prompt_cache_key, apart for each tenant; "" for none."""
    key = body.get("prompt_cache_key")
    return f"{salt}:{key[:AFFINITY_CHARS_MAX]}" if isinstance(key, str) and key else ""
