"""From a request's body to a plan: which replica, importing from whom, with which token ids."""

import itertools
import random
import re
import time
from collections.abc import Callable, Mapping, Set
from typing import Any, Protocol

from engine.fleet import FleetView, Replica, ReplicaState
from gateway.body import Endpoint
from gateway.costs import CostModel, ModelKey
from gateway.errors import NoReplicaReady, ReplicaNotReady, UnknownReplica
from gateway.feed import DeliveryFeed
from gateway.flights import Flight, Flights
from gateway.known_prompt import PromptReader
from gateway.load import FleetLoad, Ticket
from gateway.parity import ParityCounts, ParityVerdict
from gateway.plan import Asked, Plan, SteeringCounts
from gateway.popularity import Popularity
from gateway.prefixes import PrefixCounts
from gateway.promises import Promise
from gateway.registry import LookUp, Registry
from gateway.served_models import ServedModels
from gateway.steering import Candidate, Decision, PromptView, steer
from gateway.tables import Table, Tables
from gateway.tenants import TenantContext
from gateway.tokens import TokenService

HINT = "peerkv"
"""The key in kv_transfer_params that our connector reads.

{"source": a replica's name, "" to import nothing; "tag": int, comes back with the delivery; "tokens": import no further}.
"""
CHAT_IDS = "prompt_token_ids"
"""The key in kv_transfer_params under which vLLM's server takes a chat's token ids."""
CHAT_IDS_SINCE = (0, 32)
"""The first version known to do so. Version 0.26 does not, and would hand them on to the engine."""
AFFINITY_CHARS_MAX = 512
_TAG_BITS = 62


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
        self._fleet = fleet
        self._send_chat_ids = settings.send_chat_ids
        self.registry = Registry(tables, settings.key_cache_bytes_max)
        self._imports = settings.imports
        self._reader = PromptReader(tokens, settings.tokenize_inline_chars_max, models)
        self._clock = clock
        self._turns = itertools.count()
        self._tags = random.SystemRandom()
        self._keys: dict[str, tuple[int, ModelKey]] = {}
        self.costs = CostModel()
        self.load = FleetLoad()
        self._flights = Flights(self.load, self.costs, self.registry.refused)
        self.feed = DeliveryFeed(self.registry.tables)
        self.feed.add(self._flights.delivered)
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
        self._ready(pinned, frozenset())
        asked = Asked(
            known=await self._reader.read(endpoint, body),
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
        now = self._clock()
        self._listen(plan.replica.name)
        self._flights.first_byte(plan.tag, now)

    def finished(self, plan: Plan) -> None:
        """The request ended there; call it once for each `started`."""
        self._listen(plan.replica.name)
        self._flights.finished(plan.tag, self._clock())

    def in_flight(self) -> Mapping[str, int]:
        """Requests with each replica now."""
        return self.load.in_flight()

    def _listen(self, replica: str) -> None:
        table = self.registry.table(replica)
        if table is not None:
            self._flights.listen(replica, table)
            self.feed.poll(replica)

    def _ready(self, pinned: str | None, exclude: Set[str]) -> list[Replica]:
        snapshot = self._fleet.snapshot()
        if pinned is not None:
            replica = snapshot.find(pinned)
            if replica is None:
                raise UnknownReplica(pinned, [known.name for known in snapshot.replicas])
            if replica.state is not ReplicaState.READY:
                raise ReplicaNotReady(pinned, replica.state.value)
            if pinned in exclude:
                raise NoReplicaReady(f"{pinned} was lost")
        ready = [replica for replica in snapshot.ready() if replica.name not in exclude]
        if not ready:
            raise NoReplicaReady("; ".join(f"{replica.name} is {replica.state.value}" for replica in snapshot.replicas))
        return ready

    def _decide(self, asked: Asked, exclude: Set[str], *, first: bool = False) -> Plan:
        ready = {replica.name: replica for replica in self._ready(asked.pinned, exclude)}
        now, known = self._clock(), asked.known
        tables = self.registry.tables()
        self._flights.keep(tables)
        for name, table in tables.items():
            self._flights.listen(name, table)
        self.feed.refresh(tables)
        look_up = LookUp()
        if known.ids is not None:
            look_up = self.registry.look_up(known.ids, asked.salt, asked.lora, tables)
            for keys, block_size in look_up.keys[:1] if first else ():
                self.prefixes.note(keys, block_size, time.time())
                self._popularity.note(keys, now)
        candidates = self._candidates(ready, asked, look_up, tables, now)
        view = self._view(asked, look_up, candidates, now)
        decision = steer(view, candidates, self.costs, now, next(self._turns))
        plan = self._plan(asked, ready[decision.replica], decision, look_up, tables, now)
        self.counts.count(plan)
        return plan

    def _candidates(
        self, ready: Mapping[str, Replica], asked: Asked, look_up: LookUp, tables: Mapping[str, Table], now: float
    ) -> list[Candidate]:
        cacheable = asked.known.cacheable
        promises: dict[str, Promise] = {}
        if cacheable:
            for keys, block_size in look_up.keys:
                promises.update(self.load.promised(keys, block_size))
        found = []
        for name, replica in ready.items():
            holding = look_up.holdings.get(name) if cacheable else None
            table = tables.get(name)
            found.append(
                Candidate(
                    name,
                    holding.tokens if holding else 0,
                    self.load.load(name, now),
                    holding.exchanges_with if holding and self._imports else frozenset(),
                    self._key(replica, table),
                    table.transport if table else "",
                    promises.get(name),
                    asked.pinned is None or asked.pinned == name,
                )
            )
        return found

    def _view(self, asked: Asked, look_up: LookUp, candidates: list[Candidate], now: float) -> PromptView:
        rate, block_size = 0.0, 1
        if look_up.keys and asked.known.cacheable:
            keys, block_size = look_up.keys[0]
            rate = self._popularity.rate(keys, max(each.held_tokens for each in candidates) // block_size, now)
        return PromptView(asked.known.tokens, asked.affinity, rate, self.load.decode_seconds, block_size)

    def _key(self, replica: Replica, table: Table | None) -> ModelKey:
        """Whose prefill terms a replica has: its kind of device's, with the fingerprint for the model."""
        epoch = table.epoch if table else 0
        known = self._keys.get(replica.name)
        if known is None or known[0] != epoch:
            model = table.fingerprint.hex()[:16] if table else ""
            known = self._keys[replica.name] = (epoch, ModelKey(replica.device.partition(":")[0], model))
        return known[1]

    def _plan(
        self, asked: Asked, replica: Replica, decision: Decision, look_up: LookUp, tables: Mapping[str, Table], now: float
    ) -> Plan:
        known, expected = asked.known, decision.expected
        tag = self._tags.getrandbits(_TAG_BITS) + 1
        table = tables.get(replica.name)
        holding = look_up.holdings.get(replica.name) if known.cacheable else None
        keys, block_size = look_up.keys[holding.chain] if holding else (None, 0)
        cached = expected.local_tokens + expected.peer_tokens
        ready_at = now + expected.seconds
        ticket = Ticket(tag, replica.name, decision.source, known.tokens, cached, ready_at, keys, block_size)
        flight = Flight(
            ticket=ticket,
            key=self._key(replica, table),
            load=self.load.load(replica.name, now),
            transport=table.transport if table else "",
            decided_at=now,
            expected_seconds=expected.seconds,
            streamed=asked.streamed,
            teaches=known.count == 1 and not asked.embeds,
            reports=table is not None and not asked.embeds,
        )
        held = holding.tokens if holding else 0
        params = _hint(asked, decision, tag, held, imports=self._imports) if flight.reports else None
        if params is not None and known.chat_ids and self._send_chat_ids and table is not None and _takes_chat_ids(table):
            params[CHAT_IDS] = known.ids
        return Plan(
            replica=replica,
            decision=decision,
            tag=tag,
            prompt=known.sent,
            kv_transfer_params=params,
            cache_salt=asked.salt or None,
            prompt_tokens=len(known.ids or ()),
            predicted_tokens=cached,
            held_tokens_max=max((each.tokens for each in look_up.holdings.values()), default=0) if known.cacheable else 0,
            reason=decision.reason if known.ids is not None else f"{decision.reason} ({known.why_unknown})",
            flight=flight,
            asked=asked,
        )


def _hint(asked: Asked, decision: Decision, tag: int, held_tokens: int, *, imports: bool) -> dict[str, Any]:
    """Tell the connector what to import, nothing where `imports` is off.

    Without a source, it is told to look no further only if we know for certain what the replica holds: what it is still
    computing or importing may not be there in time, and then another replica may have it.
    """
    hint: dict[str, Any] = {"tag": tag}
    if decision.source is not None and asked.known.cacheable:
        hint["source"] = decision.source
        if decision.import_tokens_max is not None:
            hint["tokens"] = decision.import_tokens_max
    elif not imports or (asked.known.certain and asked.known.count == 1 and held_tokens >= decision.expected.local_tokens):
        hint["source"] = ""
    return {HINT: hint}


def _takes_chat_ids(table: Table) -> bool:
    """Tell whether an engine takes token ids in place of rendering and tokenising a chat's messages."""
    found = re.match(r"(\d+)\.(\d+)", table.fingerprint_fields.get("vllm", ""))
    return found is not None and (int(found[1]), int(found[2])) >= CHAT_IDS_SINCE


def _affinity(body: Mapping[str, Any], salt: str) -> str:
    """The request's prompt_cache_key, apart for each tenant; "" for none."""
    key = body.get("prompt_cache_key")
    return f"{salt}:{key[:AFFINITY_CHARS_MAX]}" if isinstance(key, str) and key else ""
