"""From a request's body to a plan: which replica, importing from whom, with which token ids."""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.fleet import FleetView, Replica, ReplicaState
from gateway.body import Endpoint
from gateway.errors import NoReplicaReady, PromptTooLong, ReplicaNotReady, UnknownReplica
from gateway.parity import Parity, ParityCounts, ParityVerdict
from gateway.prefixes import PrefixCounts
from gateway.prompts import depends_on_text, ids_are_the_prompt, reads_no_cache, split_prompts
from gateway.registry import LookUp, Registry
from gateway.served_models import ServedModels
from gateway.steering import Candidate, Decision, best_source, steer
from gateway.tables import Tables
from gateway.tenants import TenantContext
from gateway.tokens import NoTokenIds, TextTooLong, TokenService
from transport.adapter import adapter_identity

_logger = logging.getLogger(__name__)

HINT = "peerkv"
"""The key in kv_transfer_params that our connector reads: {"source": a replica's name, "" to import nothing}."""


class PlannerSettings(Protocol):
    """What the planner needs of the settings."""

    @property
    def replica_requests_max(self) -> int: ...
    @property
    def prefixes_tracked_max(self) -> int: ...
    @property
    def tokenize_inline_chars_max(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What is known of a request's prompt. `ids` steer it (None: unknown); `sent` replaces the text in the body.

    `certain` says that `ids` are exactly the engine's, `cacheable` that the engine may take any of them from a cache.
    """

    ids: Sequence[int] | None
    sent: list[Any] | None = None
    certain: bool = False
    cacheable: bool = True
    count: int = 1
    why_unknown: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a request goes. `prompt` (token ids in place of text), `kv_transfer_params` and `cache_salt` go into its body.

    `predicted_tokens` of `prompt_tokens` are expected out of a cache, the replica's own or the source's.
    """

    replica: Replica
    source: str | None
    prompt: list[Any] | None
    kv_transfer_params: dict[str, Any] | None
    cache_salt: str | None
    prompt_tokens: int
    predicted_tokens: int
    reason: str
    pinned: str | None = None
    known: _Prompt = field(default_factory=lambda: _Prompt(None), repr=False)
    salt: str = field(default="", repr=False)
    lora: str = ""


@dataclass(slots=True)
class SteeringCounts:
    """Decisions since the start, by the names that /kv/stats shows."""

    planned: int = 0
    without_ids: int = 0
    to_holder: int = 0
    with_source: int = 0
    pinned: int = 0
    prompt_tokens: int = 0
    predicted_tokens: int = 0

    def count(self, plan: Plan) -> None:
        """Count a decision."""
        self.planned += 1
        self.without_ids += plan.known.ids is None
        self.with_source += plan.source is not None
        self.pinned += plan.pinned is not None
        self.to_holder += plan.pinned is None and plan.source is None and plan.predicted_tokens > 0
        self.prompt_tokens += plan.prompt_tokens
        self.predicted_tokens += plan.predicted_tokens


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
    ) -> None:
        self._fleet = fleet
        self.registry = Registry(tables)
        self._tokens = tokens
        self._settings = settings
        self._models = models
        self._in_flight: Counter[str] = Counter()
        self._turns = itertools.count()
        self.parity = ParityVerdict()
        self.parity_counts = ParityCounts()
        self.counts = SteeringCounts()
        self.prefixes = PrefixCounts(settings.prefixes_tracked_max)

    async def plan(
        self, endpoint: Endpoint, body: Mapping[str, Any], tenant: TenantContext, *, pinned: str | None = None
    ) -> Plan:
        """Return a plan for the request, whose body stays as it is.

        `pinned` names the replica it has to go to. Raises ApiError: NoReplicaReady, UnknownReplica, ReplicaNotReady,
        PromptTooLong, InvalidRequest.
        """
        self._ready(pinned, frozenset())
        known = await self._know(endpoint, body)
        return self._decide(known, tenant.salt, self._lora(body), pinned, frozenset(), first=True)

    def replan(self, plan: Plan, *, exclude: Set[str]) -> Plan:
        """Return another plan for the same request, on none of the replicas in `exclude`. Raises NoReplicaReady."""
        return self._decide(plan.known, plan.salt, plan.lora, plan.pinned, exclude)

    def started(self, plan: Plan) -> None:
        """Count the request as being with its replica."""
        self._in_flight[plan.replica.name] += 1

    def finished(self, plan: Plan) -> None:
        """The request ended there; call it once for each `started`."""
        self._in_flight[plan.replica.name] -= 1

    def in_flight(self) -> Mapping[str, int]:
        """Requests with each replica now."""
        return {name: count for name, count in self._in_flight.items() if count}

    def _ready(self, pinned: str | None, exclude: Set[str]) -> list[Replica]:
        snapshot = self._fleet.snapshot()
        if pinned is not None:
            replica = snapshot.find(pinned)
            if replica is None:
                raise UnknownReplica(pinned, [known.name for known in snapshot.replicas])
            if replica.state is not ReplicaState.READY:
                raise ReplicaNotReady(pinned, replica.state.value)
        ready = [replica for replica in snapshot.ready() if replica.name not in exclude]
        if not ready:
            raise NoReplicaReady("; ".join(f"{replica.name} is {replica.state.value}" for replica in snapshot.replicas))
        return ready

    def _lora(self, body: Mapping[str, Any]) -> str:
        """Return the adapter that the request names as the connector spells it, "" for none."""
        models = self._models()
        card = models.cards.get(body.get("model") or "") if models else None
        return adapter_identity(card["id"], card.get("root") or "") if card and card.get("parent") else ""

    async def _know(self, endpoint: Endpoint, body: Mapping[str, Any]) -> _Prompt:
        if endpoint == "embeddings":
            return _Prompt(None, cacheable=False, why_unknown="embeddings are computed whole")
        param, read = ("prompt", self._completion) if endpoint == "completions" else ("messages", self._chat)
        if _characters(body.get(param)) <= self._settings.tokenize_inline_chars_max:
            return read(body)
        return await asyncio.to_thread(read, body)

    def _completion(self, body: Mapping[str, Any]) -> _Prompt:
        prompts = split_prompts(body.get("prompt"))
        cacheable = not reads_no_cache(body)
        if not ids_are_the_prompt(body):
            return _Prompt(None, cacheable=cacheable, count=len(prompts), why_unknown="the engine changes the prompt")
        text = isinstance(prompts[0], str)
        certain = not text or self.parity.completions.parity is Parity.EXACT
        special = body.get("add_special_tokens", True)
        try:
            ids = [self._encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in prompts]
            self._check_length("prompt", max(map(len, ids)), certain)
        except TextTooLong as long:
            self._check_length("prompt", long.tokens_min, certain)
            return _Prompt(None, cacheable=cacheable, count=len(prompts), why_unknown=str(long))
        except NoTokenIds as unknown:
            return _Prompt(None, cacheable=cacheable, count=len(prompts), why_unknown=str(unknown))
        sent: list[Any] | None = None
        if text and certain and not depends_on_text(body) and all(ids):
            sent = ids[0] if isinstance(body["prompt"], str) else ids
        return _Prompt(max(ids, key=len), sent, certain, cacheable, len(prompts))

    def _encode(self, prompt: str, special: object) -> list[int]:
        if not isinstance(special, bool):
            raise NoTokenIds("add_special_tokens is malformed")
        return self._tokens.encode(prompt, special, self._context_tokens())

    def _chat(self, body: Mapping[str, Any]) -> _Prompt:
        cacheable = not reads_no_cache(body)
        parity = self.parity.chat.parity
        if parity is Parity.OFF:
            return _Prompt(None, cacheable=cacheable, why_unknown="chats are not tokenised as the engine does")
        certain = parity is Parity.EXACT
        try:
            ids = self._tokens.encode_chat(body, self._context_tokens())
            self._check_length("messages", len(ids), certain)
        except TextTooLong as long:
            self._check_length("messages", long.tokens_min, certain)
            return _Prompt(None, cacheable=cacheable, why_unknown=str(long))
        except NoTokenIds as unknown:
            return _Prompt(None, cacheable=cacheable, why_unknown=str(unknown))
        return _Prompt(ids, None, certain, cacheable)

    def _context_tokens(self) -> int | None:
        models = self._models()
        known = models.context_tokens if models else None
        return self.parity.context_tokens if known is None else known

    def _check_length(self, param: str, tokens: int, certain: bool) -> None:
        """Refuse what the engine is certain to refuse. Raises PromptTooLong."""
        limit = self._context_tokens()
        if certain and limit is not None and tokens > limit:
            raise PromptTooLong(tokens, limit, param=param)

    def _decide(
        self, known: _Prompt, salt: str, lora: str, pinned: str | None, exclude: Set[str], *, first: bool = False
    ) -> Plan:
        ready = {replica.name: replica for replica in self._ready(pinned, exclude)}
        look_up = LookUp()
        if known.ids is not None:
            look_up = self.registry.look_up(known.ids, salt, lora)
            for keys, block_size in look_up.keys[:1] if first else ():
                self.prefixes.note(keys, block_size, time.time())
        candidates = [self._candidate(name, look_up, known.cacheable) for name in ready]
        decision = self._steer(candidates, pinned)
        held = self._held(look_up, decision) if known.cacheable else 0
        plan = Plan(
            replica=ready[decision.replica],
            source=decision.source,
            prompt=known.sent,
            kv_transfer_params=self._hint(known, decision),
            cache_salt=salt or None,
            prompt_tokens=len(known.ids or ()),
            predicted_tokens=held,
            reason=decision.reason if known.ids is not None else f"{decision.reason} ({known.why_unknown})",
            pinned=pinned,
            known=known,
            salt=salt,
            lora=lora,
        )
        self.counts.count(plan)
        return plan

    def _candidate(self, name: str, look_up: LookUp, cacheable: bool) -> Candidate:
        holding = look_up.holdings.get(name) if cacheable else None
        in_flight = self._in_flight[name]
        if holding is None:
            return Candidate(name, 0, in_flight)
        return Candidate(name, holding.blocks, in_flight, holding.exchanges_with)

    def _steer(self, candidates: Sequence[Candidate], pinned: str | None) -> Decision:
        if pinned is None:
            bound = self._settings.replica_requests_max
            return steer(candidates, replica_requests_max=bound, turn=next(self._turns))
        taker = next((candidate for candidate in candidates if candidate.name == pinned), None)
        if taker is None:
            raise NoReplicaReady(f"{pinned} was lost")
        return Decision(pinned, best_source(taker, candidates), "pinned")

    @staticmethod
    def _held(look_up: LookUp, decision: Decision) -> int:
        names = (decision.replica, decision.source or decision.replica)
        return max((look_up.holdings[name].tokens for name in names if name in look_up.holdings), default=0)

    def _hint(self, known: _Prompt, decision: Decision) -> dict[str, Any] | None:
        """Tell the connector what to import. Without a source, it is told to look no further only if we know for certain."""
        if not known.cacheable or decision.replica not in self.registry.tables():
            return None
        if decision.source is not None:
            return {HINT: {"source": decision.source}}
        return {HINT: {"source": ""}} if known.certain and known.count == 1 else None


def _characters(value: object) -> int:
    """Return roughly how many characters of text are in a prompt or a list of messages."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list):
            if not (item and isinstance(item[0], int)):
                waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return total
