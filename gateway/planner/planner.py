"""From a request's body to a plan: which replica, importing from whom, with which token ids."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence, Set
from math import inf
from typing import Any, Protocol

import msgspec

from engine.fleet import FleetView
from gateway.api.endpoints import ENDPOINTS, Endpoint
from gateway.block_registry.chain import Chain
from gateway.block_registry.delivery_feed import DeliveryFeed
from gateway.block_registry.fleet_state import FleetState, ReadyReplica
from gateway.block_registry.fleet_watch import FleetWatch
from gateway.block_registry.lifetime_counters import LifetimeCounters
from gateway.block_registry.registry import NOTHING, LookUp, Registry
from gateway.block_registry.tables import Tables
from gateway.limits.request_size import PromptSize
from gateway.planner.plan import Plan, PlanningRequest, SteeringStats
from gateway.planner.plan_hint import CHAT_IDS, Tags, hint
from gateway.planner.prefix_counts import PrefixCounts
from gateway.planner.promotions import NoTiers, Promotion, Promotions, Tiers
from gateway.planner.ready import with_ready
from gateway.planner.recent_prompts import RecentPrompts
from gateway.planner.shortlist import ALL_MAX, best_first, shortlist, window
from gateway.prompts.prompt_reader import CHARS_PER_TOKEN, KnownPrompt, PromptReader
from gateway.prompts.tokenizer.service import TokenService
from gateway.steering.costs.model import CostModel, ModelKey
from gateway.steering.costs.priors import REMOTE_TRANSPORT
from gateway.steering.evictions import Evictions
from gateway.steering.in_flight import Flight, Flights
from gateway.steering.load import FleetLoad
from gateway.steering.outliers import Outliers
from gateway.steering.popularity import Popularity
from gateway.steering.slow_start import SlowStart
from gateway.steering.steer import Candidate, Decision, PromptView, steer
from gateway.tenants.tenants import TenantContext
from gateway.token_ids import TokenIds
from gateway.upstream.served_models import ServedModels
from transport.hint import write_hint
from transport.node.names import node_of
from transport.table.quality import is_lossy_salt

AFFINITY_CHARS_MAX = 512


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
    @property
    def slow_start_seconds(self) -> float: ...
    @property
    def tier_wait_seconds_max(self) -> float: ...


class Planner:
    """Plans requests for one fleet. Belongs to the event loop's thread.

    Tell `flights` of the plan's without an await after `plan`, `decide` or `replan`: the next plan then knows of this request.
    """

    def __init__(
        self,
        fleet: FleetView,
        tables: Tables,
        tokens: TokenService,
        settings: PlannerSettings,
        models: Callable[[], ServedModels | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        outliers: Outliers | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        self.fleet = FleetWatch(fleet, tables, imports=settings.imports)
        self.outliers = Outliers(0, 1.0, 1.0) if outliers is None else outliers
        self.slow_start = SlowStart(settings.slow_start_seconds)
        self._pids: Mapping[str, int | None] = {}
        self._served: dict[str, int | None] = {}
        self._doubted: Mapping[str, str] = {}
        self._overdue: Mapping[str, str] = {}
        self._send_chat_ids = settings.send_chat_ids
        self.registry = Registry(settings.key_cache_bytes_max)
        self.lifetime_counters = LifetimeCounters()
        self._imports = settings.imports
        self.prompts = PromptReader(tokens, settings.tokenize_inline_chars_max, models)
        self._clock = clock
        self._turns = itertools.count()
        self._tags = Tags()
        self._model_keys: dict[str, ModelKey] = {}
        self.costs = CostModel()
        self.promotions = Promotions(tiers or NoTiers(), self.costs, settings.tier_wait_seconds_max, clock)
        self.load = FleetLoad()
        self.flights = Flights(self.load, self.costs, self.fleet.refused)
        self.feed = DeliveryFeed()
        self.evictions = Evictions()
        self.feed.add(self.flights.delivered)
        self.feed.add(self.evictions.delivered)
        self._popularity = Popularity(settings.prefixes_tracked_max)
        self._flushed_at = -inf
        self.counts = SteeringStats()
        self.prefixes = PrefixCounts(settings.prefixes_tracked_max)
        self.recent = RecentPrompts()
        self.fleet.on_change(self._fleet_changed)

    async def plan(
        self, endpoint: Endpoint, body: Mapping[str, Any], tenant: TenantContext, *, wanted_replica: str | None = None
    ) -> Plan:
        """Return a plan for the request: `read` and `decide` in one. Raises what they raise."""
        return self.decide(await self.read(endpoint, body, tenant, wanted_replica=wanted_replica))

    async def read(
        self,
        endpoint: Endpoint,
        body: Mapping[str, Any],
        tenant: TenantContext,
        *,
        wanted_replica: str | None = None,
        known: KnownPrompt | None = None,
    ) -> PlanningRequest:
        """Return what planning needs to know of the request; the body is not changed.

        `wanted_replica` names the one it has to go to, `known` is its prompt if that was read before. Raises ApiError:
        NoReplicaReady, UnknownReplica, ReplicaNotReady, PromptTooLong, InvalidRequest.
        """
        with_ready(self.fleet.now(), wanted_replica)
        if known is None:
            known = await self.prompts.read(endpoint, body, tenant.salt)
        lora = self.prompts.adapter(body)
        promotion = None
        if self.promotions.active and self._imports and known.cacheable:
            promotion = await self._bring_up(known, tenant.salt, lora, wanted_replica)
        return PlanningRequest(
            known=known,
            salt=tenant.salt,
            lora=lora,
            promotion=promotion,
            affinity=_affinity(body, tenant.salt),
            wanted_replica=wanted_replica,
            streamed=body.get("stream") is True,
            hinted=ENDPOINTS[endpoint].takes_hint,
            salted=ENDPOINTS[endpoint].takes_salt,
            stepless=ENDPOINTS[endpoint].work == "counts",
        )

    async def _bring_up(self, known: KnownPrompt, salt: str, lora: str, wanted: str | None) -> Promotion | None:
        """Have what disk and vault hold of a prompt brought up."""
        state = self.fleet.now()
        if known.ids is None:
            return None
        look_up = self.registry.look_up(state, known.ids, salt, lora)
        came = await self.promotions.bring_up(state, look_up, known.tokens, self._model_keys, wanted, lossy=is_lossy_salt(salt))
        if came is not None and came.source:
            self.registry.look_again()
        return came

    def prompt_size(self, request: PlanningRequest) -> PromptSize:
        """Return how long the prompts of what was read are. Without ids, they are taken for as many tokens as characters."""
        known = request.known
        if known.ids is not None:
            return PromptSize(known.tokens, known.count, certain=True)
        return PromptSize((known.tokens + 1) * CHARS_PER_TOKEN, known.count, certain=False)

    def uncached_tokens(self, request: PlanningRequest) -> int:
        """Return how many tokens of what was read no replica holds now."""
        known = request.known
        if known.ids is None:
            return known.tokens  # of all prompts together
        found = self.registry.look_up(self.fleet.now(), known.ids, request.salt, request.lora)
        return max(0, known.tokens - found.held_tokens_max) * known.count

    def decide(self, request: PlanningRequest) -> Plan:
        """Return a plan for what was read. Raises NoReplicaReady, UnknownReplica and ReplicaNotReady."""
        return self._decide(request, frozenset())

    def replan(self, plan: Plan, *, exclude: Set[str]) -> Plan:
        """Return another plan for the same request, on none of the replicas in `exclude`. Raises NoReplicaReady."""
        return self._decide(plan.request, exclude, plan)

    def knows_prompt(self, plan: Plan) -> bool:
        """Whether the ids of the plan's prompt are known to be the engine's."""
        known = plan.request.known
        return known.ids is not None and known.certain and known.count == 1

    def go_on(
        self, plan: Plan, output: Sequence[int], *, chat: bool, prompt: Sequence[int] | None, exclude: Set[str]
    ) -> Plan | None:
        """Return a plan to go on behind the `output` that the plan's replica made, on none of those in `exclude`.

        `prompt` are the ids of its prompt as an engine told them, None if ours are known to be the same. None if the engine
        would not take the ids of a chat. Raises NoReplicaReady.
        """
        former = plan.request.known
        ids = former.ids if prompt is None else TokenIds.of(prompt)
        if ids is None or (chat and not (former.chat_ids and self._send_chat_ids)):
            return None
        whole = TokenIds.joined([ids, TokenIds.of(output)])
        known = KnownPrompt(
            *(whole, None if chat else whole),
            certain=True,
            cacheable=former.cacheable,
            tokens=len(whole),
            chat_ids=former.chat_ids,
        )
        request = msgspec.structs.replace(plan.request, known=known, wanted_replica=None)
        found = self._decide(request, exclude, plan)
        return None if chat and CHAT_IDS not in (found.kv_transfer_params or {}) else found

    def waiting(self) -> Mapping[str, Sequence[Flight]]:
        """For each replica, its requests without a first token so far; replicas without any are left out.

        Also notes changes of the fleet, which nothing else does while no requests come.
        """
        self.fleet.now()
        for name in self.load.in_flight():
            self.feed.poll(name)
        return self.flights.waiting()

    def overdue(self, why: Mapping[str, str]) -> None:
        """These replicas give no sign of life, with the reason by name: they get no requests until the next call."""
        self._overdue = why
        self.outliers.suspect({**self._doubted, **why} if self._doubted else why)

    def _fleet_changed(self, state: FleetState) -> None:
        """Forget what is gone, and the failures of what was replaced. Replicas that the supervisor doubts get nothing new."""
        pids = {replica.name: replica.pid for replica in state.snapshot.replicas}
        self.outliers.keep([name for name, pid in pids.items() if self._pids.get(name) == pid])
        self._pids = pids
        for name in state.ready:
            if self._served.setdefault(name, pids[name]) != pids[name]:
                self._served[name] = pids[name]
                self.slow_start.began(name, self._clock())
        self._doubted = {name: one.replica.reason for name, one in state.ready.items() if one.replica.reason}
        self.overdue(self._overdue)
        self.lifetime_counters.observe(state.tables)
        self.feed.watch(state.tables)
        self.flights.keep(state.tables)
        self.evictions.caches({name: table.num_blocks * table.block_size for name, table in state.tables.items()})
        for name, table in state.tables.items():
            self.evictions.appeared(name, table)
        self._model_keys = {name: _model_key(one) for name, one in (*state.ready.items(), *state.draining.items())}
        self.costs.transport_measured(REMOTE_TRANSPORT, state.snapshot.network_bytes_per_second)
        for name, one in state.ready.items():
            if one.table is not None:
                self.costs.size_imports(self._model_keys[name].device, *one.table.import_bytes())

    def flushed(self) -> None:
        """Caches have just been emptied on request: what is missed of them was not given up too early."""
        self._flushed_at = self._clock()

    def in_flight(self) -> Mapping[str, int]:
        """Requests with each replica now."""
        return self.load.in_flight()

    def _decide(self, request: PlanningRequest, exclude: Set[str], former: Plan | None = None) -> Plan:
        turn = next(self._turns)
        looked_at = self._listen(self.fleet.now(), turn)
        state = with_ready(self.fleet.latest, request.wanted_replica, exclude)
        now, known = self._clock(), request.known
        look_up = usable = NOTHING
        if known.ids is not None:
            look_up = self.registry.look_up(state, known.ids, request.salt, request.lora)
            if known.cacheable:
                usable = look_up
        candidates, held, computed = self._candidates(state, request, usable, now, looked_at)
        formerly = (0, False)
        if former is not None:
            formerly = (former.formerly_tokens, former.flushed)
        elif look_up.chains:
            formerly = self._note(*look_up.chains[0], max(look_up.held_tokens_max, computed), now, missed=known.cacheable)
            if known.cacheable and known.count == 1:
                self.recent.note(look_up.chains[0][0], request)
        view = self._view(request, usable, held, now)
        decision = steer(view, candidates, self.costs, now, turn, state.names)
        plan = self._plan(request, state.ready[decision.replica], decision, usable, formerly, now)
        self.counts.count(plan)
        return plan

    def _listen(self, state: FleetState, turn: int) -> Sequence[str] | None:
        """Take in what engines say of their load and delivered: all of them, None, or the named ones of very many."""
        if len(state.ready) <= ALL_MAX:
            self.flights.listen_to(state.tables)
            self.feed.refresh()
            return None
        looked_at = window(state.names, turn)
        self._hear(state, looked_at)
        return looked_at

    def _hear(self, state: FleetState, names: Sequence[str]) -> None:
        for name in names:
            if (table := state.tables.get(name)) is not None:
                self.flights.listen(name, table)
                self.feed.poll(name)

    def _weighed(
        self, state: FleetState, request: PlanningRequest, look_up: LookUp, promises: Mapping[str, int], now: float,
        looked_at: Sequence[str],
    ) -> Mapping[str, ReadyReplica]:  # fmt: skip
        """Return those of very many ready replicas that are weighed."""
        wanted = () if request.wanted_replica is None else (request.wanted_replica,)
        holders = best_first(wanted, promises, look_up.blocks)
        names = shortlist(state.ready, holders, looked_at, lambda name: self.load.load(name, now))
        self._hear(state, names)
        return {name: state.ready[name] for name in names}

    def _candidates(
        self, state: FleetState, request: PlanningRequest, look_up: LookUp, now: float, looked_at: Sequence[str] | None
    ) -> tuple[list[Candidate], int, int]:
        """Return the ready replicas, and how many tokens of the prompt one of them holds and one of them computes at most.

        Draining ones get no request, but others may import from them. Of very many ready ones, whose load was `looked_at` for
        this request, only those that are weighed.
        """
        promises: Mapping[str, int] = {}
        for chain, block_size in look_up.chains:
            promised = self.load.promised(chain, block_size)
            promises = {**promises, **promised} if promises else promised
        ready, names = state.ready, state.names
        if looked_at is not None:
            ready = self._weighed(state, request, look_up, promises, now, looked_at)
            names = list(ready)
        takers = self.slow_start.takers(self.outliers.takers(names, now), now, self.load.in_flight)
        blocks, load, wanted, keys = look_up.blocks, self.load.load, request.wanted_replica, self._model_keys
        tiers = look_up.tiers
        found = []
        held_most = computed_most = 0
        for name, one in (*ready.items(), *state.draining.items()) if state.draining else ready.items():
            held, promise, ahead = blocks.get(name, 0), promises.get(name, 0), load(name, now)
            if held:
                held *= one.block_size
                if held > held_most:
                    held_most = held
            if promise > computed_most:
                computed_most = promise
            able = (takers is names or name in takers) if wanted is None else wanted == name
            takes = able and name not in state.draining
            room, table = inf, one.table
            if table is not None:  # each request that is being decoded has a block without a key
                room = (one.blocks - table.cached_blocks() - ahead.decoding) * one.block_size
            candidate = Candidate(
                name=name,
                held_tokens=held,
                load=ahead,
                exchanges_with=one.sources,
                key=keys[name],
                transport=one.transport,
                promised_tokens=promise,
                takes=takes,
                node=node_of(name),
                room_tokens=room,
            )
            if (found_tier := tiers.get(name)) is not None:
                tier, reached = found_tier
                candidate = msgspec.structs.replace(candidate, tier=tier, tier_tokens=reached * one.block_size)
            found.append(candidate)
        return found, held_most, computed_most

    def _note(self, chain: Chain, block_size: int, at_hand: int, now: float, *, missed: bool) -> tuple[int, bool]:
        """Count a request. Return how many of its tokens were asked for before, 0 if no more than are held or being computed,
        and whether caches were flushed since.

        What of these was given up too early is `missed`.
        """
        since = self.evictions.counts_since(now) if missed else inf
        formerly, lately, formerly_at = self._popularity.note(chain, now, at_hand // block_size, since)
        flushed = formerly_at <= self._flushed_at
        if lately * block_size > at_hand and not flushed:
            self.evictions.missed(lately * block_size - at_hand, at_hand)
        self.prefixes.note(chain, block_size, time.time())
        return formerly * block_size, flushed

    def _view(self, request: PlanningRequest, look_up: LookUp, held: int, now: float) -> PromptView:
        rate, block_size = 0.0, 1
        if look_up.chains:
            chain, block_size = look_up.chains[0]
            if held:
                rate = self._popularity.rate(chain, held // block_size, now)
        again = self.evictions.again()
        if not look_up.divisible:
            block_size = request.known.tokens + 1  # an import must not be cut
        return PromptView(request.known.tokens, request.affinity, rate, self.load.decode_seconds, block_size, again)

    def _plan(
        self,
        request: PlanningRequest,
        one: ReadyReplica,
        decision: Decision,
        look_up: LookUp,
        formerly: tuple[int, bool],
        now: float,
    ) -> Plan:
        known, expected, name, table = request.known, decision.expected, one.name, one.table
        place = look_up.places.get(name)
        chain, block_size = look_up.chains[place] if place is not None else (None, 0)
        cached = expected.local_tokens + expected.peer_tokens
        new, seconds = known.tokens - cached, expected.seconds
        flight = Flight(
            tag=self._tags.next(),
            replica=name,
            source=decision.source,
            prompt_tokens=known.tokens,
            cached_tokens=cached,
            new_tokens=new,
            new_pairs=new * (cached + new / 2),
            ready_at=now + seconds,
            chain=chain,
            block_size=block_size,
            key=self._model_keys[name],
            load=self.load.load(name, now),
            transport=one.transport,
            decided_at=now,
            expected_seconds=seconds,
            streamed=request.streamed,
            teaches=known.count == 1 and request.hinted,
            reports=table is not None and request.hinted,
            stepless=request.stepless,
        )
        params = None
        if flight.reports:
            held = look_up.blocks.get(name, 0) * block_size
            params = write_hint(
                hint(known, decision, flight.tag, held, imports=self._imports, here=self.fleet.latest.snapshot.node)
            )
            if known.chat_ids and self._send_chat_ids:
                params[CHAT_IDS] = known.ids
        return Plan(
            replica=one.replica,
            decision=decision,
            tag=flight.tag,
            prompt=known.sent,
            kv_transfer_params=params,
            cache_salt=(request.salt if request.salted else "") or None,
            prompt_tokens=known.tokens if known.ids is not None else 0,
            predicted_tokens=cached,
            held_tokens_max=look_up.held_tokens_max,
            formerly_tokens=formerly[0],
            flight=flight,
            request=request,
            flushed=formerly[1],
        )


def _affinity(body: Mapping[str, Any], salt: str) -> str:
    """The request's prompt_cache_key, apart for each tenant; "" for none."""
    key = body.get("prompt_cache_key")
    return f"{salt}:{key[:AFFINITY_CHARS_MAX]}" if isinstance(key, str) and key else ""


def _model_key(one: ReadyReplica) -> ModelKey:
    """Whose prefill terms a replica has: its kind of device's, with the fingerprint for the model."""
    fingerprint = one.table.fingerprint if one.table is not None else b""
    return ModelKey(one.replica.device.partition(":")[0], fingerprint.hex()[:16])
