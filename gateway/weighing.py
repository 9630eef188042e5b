"""One request against one fleet: what each replica's best option is, and which replicas are worth a look. Pure."""

from collections.abc import Sequence
from math import inf, sqrt
from typing import NamedTuple

from gateway.choices import Action, Candidate, Expected, Option, PromptView
from gateway.cost_priors import device_kind
from gateway.costs import CHUNK_TOKENS, CostModel, ModelKey, pairs
from gateway.popularity import FADE_SECONDS

SOURCES_MAX = 4
"""Sources weighed for a replica: those that hold most, the least read first."""
HOLDERS_MAX = 16
"""Replicas with some of the prefix that are weighed in full: those with most of it, the least busy first."""
TAKERS_MAX = 8
"""Replicas without any of the prefix that are weighed in full: those with the least in front of a request."""
SPLIT_GAIN_SECONDS_MIN = 5e-4
"""A split that saves less is not worth its name: over NVLink a token's KV comes in less than a microsecond."""
BUSY_MAX = 0.95
"""A hot prefix is not reckoned to keep its holders busier than this, so that the wait expected of it stays finite."""
CHANCE_DEVIATIONS = 2.0
REMOTE_TRANSPORT = "rdma"


class Taker(NamedTuple):
    """A replica that may get the request: what is in front of it, and how much its decodes slow each other down."""

    rank: tuple[float, float, bool, str]
    queue_seconds: float
    crowd_seconds: float
    local_tokens: int
    candidate: Candidate


class _Way(NamedTuple):
    score: float
    transfer: float
    prefill: float
    cached: int
    source: Candidate | None
    action: Action


class _Model:
    """What one model's times are made of at this moment, and those that were reckoned for the prompt, by its cached tokens."""

    __slots__ = ("again", "decode_step", "decodes_full", "free", "pace", "prefills", "terms", "waits", "works")

    def __init__(self, key: ModelKey, costs: CostModel, now: float) -> None:
        kind = device_kind(key)
        self.pace = costs.pace(key, now)
        """One factor for all replicas with that model: it changes what is expected, and nothing in whom it is expected of."""
        self.terms = costs.terms(key)
        self.decode_step = self.terms.decode_step
        self.free = kind.free_tokens
        self.decodes_full = kind.decodes_full
        self.prefills: dict[int, float] = {}
        self.works: dict[int, float] = {}
        self.waits: dict[bool, float] = {}
        self.again: float | None = None


class Weighing:
    """Weighs `candidates` for `prompt` at `now`, CLOCK_MONOTONIC seconds."""

    __slots__ = ("_candidates", "_costs", "_models", "_now", "_prompt", "_sources", "_useful", "best_available")

    def __init__(self, prompt: PromptView, candidates: Sequence[Candidate], costs: CostModel, now: float) -> None:
        self._prompt = prompt
        self._costs = costs
        self._now = now
        self._useful = useful = max(0, prompt.tokens - 1)  # at least one token is always computed
        self._candidates = candidates
        self._models: dict[ModelKey, _Model] = {}
        available = 0
        sources = []
        for candidate in candidates:
            if candidate.held_tokens > 0:
                sources.append(candidate)
            promise = candidate.promise
            if promise is not None and promise.tokens > available:
                available = promise.tokens
        if len(sources) > 1:
            sources.sort(key=lambda holder: (-holder.held_tokens, holder.load.reading, holder.name))
        if sources and sources[0].held_tokens > available:
            available = sources[0].held_tokens
        self._sources = sources
        self.best_available = min(available, useful)

    def takers(self, turn: int) -> tuple[list[Taker], list[Taker]]:
        """Return all replicas that may get the request: those with some of the prefix, and the others.

        By rank, holders of more come first, then those with less in front of the request; `turn` rotates among equals.
        """
        costs, now, decode_seconds, useful = self._costs, self._now, self._prompt.decode_seconds, self._useful
        names = sorted([candidate.name for candidate in self._candidates])
        chance = _by_chance([candidate.load.requests for candidate in self._candidates if candidate.takes])
        pivot = names[turn % len(names)] if names else ""
        holding: list[Taker] = []
        others: list[Taker] = []
        for candidate in self._candidates:
            if not candidate.takes:
                continue
            name, held, load, key, promise = (
                candidate.name,
                candidate.held_tokens,
                candidate.load,
                candidate.key,
                candidate.promise,
            )
            model = self._models.get(key) or self._model(key)
            queue = costs.queue_seconds(key, load, now) * model.pace if load.busy else 0.0
            ahead, crowd, requests = queue, 0.0, load.requests
            if requests and decode_seconds:
                each = decode_seconds * model.pace / model.decodes_full
                ahead = queue + each * requests
                if requests > chance:
                    crowd = each * (requests - chance)
            if promise is not None and promise.tokens > held:
                held = promise.tokens
            if held:
                local = held if held < useful else useful
                holding.append(Taker((-local, ahead, name < pivot, name), queue, crowd, local, candidate))
            else:
                others.append(Taker((0, ahead, name < pivot, name), queue, crowd, 0, candidate))
        return holding, others

    def best_option(self, taker: Taker) -> Option:
        """The best that can be done on `taker`; an import only if it is sooner than computing."""
        _, queue, crowd, local, candidate = taker
        prompt, model = self._prompt, self._models[candidate.key]
        pace, prefill = model.pace, self._prefill(model, candidate, local)
        score, transfer, computing, cached = self._priced(prefill, model, candidate, local), 0.0, prefill, local
        source, action = None, Action.HIT if local else Action.RECOMPUTE
        if candidate.exchanges_with and self._sources and self._sources[0].held_tokens > local:
            for readable in self._readable(candidate, local):
                way = self._import(model, candidate, local, readable)
                if way.score < score and way.transfer + way.prefill < prefill:
                    score, transfer, computing, cached, source, action = way
        later = 0.0 if candidate.room_tokens == inf else self._evictions(model, candidate, local)
        if prompt.rate > 0 and self.best_available:
            wait = self._wait(model, local == 0)
            if later and not local:  # what a copy spares those who ask for it soon pays for what it pushes out
                spared = self._wait(model, one_more=False) - wait
                later = max(0.0, later - spared * prompt.rate * FADE_SECONDS)
            later += wait
        return Option(
            candidate.name,
            source.name if source is not None else None,
            action,
            cached if action is Action.SPLIT else None,
            Expected(queue, transfer * pace, computing * pace, local, cached - local, prompt.tokens - cached),
            (score + later) * pace + queue + crowd,
        )

    def _readable(self, taker: Candidate, local: int) -> list[Candidate]:
        found: list[Candidate] = []
        for source in self._sources:
            if source.held_tokens <= local or len(found) == SOURCES_MAX:
                break
            if source.name in taker.exchanges_with and source.name != taker.name:
                found.append(source)
        return found

    def _import(self, model: _Model, taker: Candidate, local: int, source: Candidate) -> _Way:
        """The best way to import from `source`: all it holds, or the head up to where computing the rest begins to cost.

        The time is linear or concave in the cut on both sides of that place, so the best cut is there or at an end.
        """
        transport = source.transport if source.node == taker.node else REMOTE_TRANSPORT
        fixed, a_token = self._costs.transfer_terms(taker.name, source.name, transport, taker.key.device)
        a_token *= 1 + max(taker.load.importing, source.load.reading)
        held = min(source.held_tokens, self._useful)
        transfer, prefill = fixed + a_token * (held - local), self._prefill(model, taker, held)
        whole = _Way(self._priced(transfer + prefill, model, taker, held), transfer, prefill, held, source, Action.PULL)
        size = self._prompt.block_size
        cut = (self._prompt.tokens - model.free) // size * size
        if not local < cut < held:
            return whole
        transfer, prefill = fixed + a_token * (cut - local), self._prefill(model, taker, cut)
        split = _Way(self._priced(transfer + prefill, model, taker, cut), transfer, prefill, cut, source, Action.SPLIT)
        return split if split.score < whole.score - SPLIT_GAIN_SECONDS_MIN else whole

    def _model(self, key: ModelKey) -> _Model:
        known = self._models[key] = _Model(key, self._costs, self._now)
        return known

    def _prefill(self, model: _Model, taker: Candidate, cached: int) -> float:
        new = self._prompt.tokens - cached
        known = model.prefills.get(cached)
        if known is None:
            known = model.prefills[cached] = self._costs.prefill_seconds(taker.key, cached, new)
        decoding = taker.load.decoding
        return known + model.decode_step * decoding * new / CHUNK_TOKENS if decoding else known

    def _priced(self, seconds: float, model: _Model, taker: Candidate, cached: int) -> float:
        """`seconds`, and what its computing costs others: as much for each request that waits there, as all wait longer."""
        waiting = taker.load.waiting
        if not waiting:
            return seconds
        work = model.works.get(cached)
        if work is None:
            new = max(0, self._prompt.tokens - cached - model.free)
            work = model.works[cached] = self._costs.work_seconds(taker.key, new, pairs(cached, new))
        return seconds + waiting * work

    def _evictions(self, model: _Model, taker: Candidate, local: int) -> float:
        """What it costs later that a full cache gives up others' KV for what it lacks of the prompt, however that comes.

        All of it or nothing: whichever of the full ones has a little room would get everything.
        """
        new, load = self._prompt.tokens - local, taker.load
        tokens = load.tokens
        if new + (load.engine_tokens if load.engine_tokens > tokens else tokens) <= taker.room_tokens:
            return 0.0
        if model.again is None:
            model.again = self._a_token_again(taker.key)
        return new * model.again

    def _a_token_again(self, key: ModelKey) -> float:
        """Seconds for each token given up: those that it takes to compute it again if it must be, for all that will wait."""
        waiting = sum(candidate.load.waiting for candidate in self._candidates) / len(self._candidates)
        return self._costs.work_seconds(key, *self._prompt.again) * (1 + waiting)

    def _wait(self, model: _Model, one_more: bool) -> float:
        """The wait to expect of further requests for a hot prefix: less once one replica more holds it."""
        known = model.waits.get(one_more)
        if known is None:
            prompt, available = self._prompt, self.best_available
            new = prompt.tokens - available
            work = model.terms.new_token * new + model.terms.pair * pairs(available, new)
            service = work + prompt.decode_seconds / model.decodes_full
            busy = min(prompt.rate * service / (max(1, len(self._sources)) + one_more), BUSY_MAX)
            known = model.waits[one_more] = service * busy / (2 * (1 - busy))  # M/D/1
        return known


def _by_chance(requests: Sequence[int]) -> float:
    """How many requests a replica may well have without any reason: two standard deviations above the mean (Poisson).

    Such a difference goes as it came. A copy of a prefix made for it would stay, and push others out of the cache.
    """
    if not requests:
        return 0.0
    mean = sum(requests) / len(requests)
    return mean + CHANCE_DEVIATIONS * sqrt(mean)
