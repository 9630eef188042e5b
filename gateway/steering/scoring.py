"""One request against one fleet: each replica's best option, and which replicas are worth considering. Pure.

An option costs what the request waits for its first token, and what it costs others: delayed decodes, the queue at a hot
prefix's holders, and what a full cache evicts.
"""

from collections.abc import Sequence
from math import sqrt
from operator import attrgetter

import msgspec

from gateway.steering.choices import Candidate, Choice, Expected, Option, PromptView
from gateway.steering.costs.model import CostModel, ModelKey
from gateway.steering.costs.priors import REMOTE_TRANSPORT
from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.costs.times import ModelTimes, pairs
from gateway.steering.popularity import FADE_SECONDS

SOURCES_MAX = 4
"""Sources considered for a replica: those that hold most, the least busy reading first."""
HOLDERS_MAX = 16
"""Replicas with part of the prefix that are scored in full: those with most of it, the least busy first."""
TAKERS_MAX = 8
"""Replicas without any of the prefix that are scored in full: those with the least work ahead."""
SPLIT_GAIN_SECONDS_MIN = 5e-4
"""A split that saves less is pointless: over NVLink a token's KV arrives in less than a microsecond."""
BUSY_MAX = 0.95
"""A hot prefix is assumed to keep its holders at most this busy, so that the expected wait stays finite."""
CHANCE_DEVIATIONS = 2.0


_HIT, _PULL, _SPLIT, _RECOMPUTE = (
    Choice.HIT,
    Choice.PULL,
    Choice.SPLIT,
    Choice.RECOMPUTE,
)  # looking it up in the class takes longer

_Way = tuple[float, float, float, int, Candidate, Choice]
"""An import: score, seconds of the transfer and of computing the rest, tokens in the cache after it, from whom, how."""


class Taker(msgspec.Struct, frozen=True, gc=False, eq=False):
    """A replica that may get the request, with `local` tokens of the prompt that it holds or computes.

    By rank those that hold more come first (counted below 0, and those without any as 1), then those with less in front of the
    request, then those whose names are not below the pivot.
    """

    rank: tuple[int, float, bool, str]
    queue_seconds: float
    local: int
    model: ModelTimes
    candidate: Candidate


_RANK = attrgetter("rank")


class Scoring:
    """Scores `candidates` for `prompt` at `now`, CLOCK_MONOTONIC seconds.

    `takers` are all replicas that may get the request, by rank: the first `holders` are those with some of the prefix. Of equal
    ones those whose names are not below `pivot` come first.
    """

    __slots__ = (
        "_candidates", "_chance", "_costs", "_held_most", "_hot", "_prompt", "_sources", "_sources_ranked", "_useful",
        "best_available", "holders", "takers",
    )  # fmt: skip

    def __init__(self, prompt: PromptView, candidates: Sequence[Candidate], costs: CostModel, now: float, pivot: str) -> None:
        self._prompt, self._candidates, self._costs = prompt, candidates, costs
        self._useful = useful = prompt.tokens - 1 if prompt.tokens else 0  # at least one token is always computed
        self._sources: list[Candidate] = []
        self._sources_ranked = False
        self.takers: list[Taker] = []
        self._held_most = self.holders = available = requests = 0
        models: dict[ModelKey, ModelTimes] = {}
        for candidate in candidates:
            name, held, load, promised = candidate.name, candidate.held_tokens, candidate.load, candidate.promised_tokens
            if held:
                self._sources.append(candidate)
                if held > self._held_most:
                    self._held_most = held
            if promised > held:
                held = promised
            if held > available:
                available = held
            if candidate.tier_tokens > available:
                available = candidate.tier_tokens
            if not candidate.takes:
                continue
            model = models.get(candidate.key)
            if model is None:
                model = models[candidate.key] = costs.model(candidate.key)
                model.begin(now, prompt.decode_seconds)
            queue = 0.0
            if load.tokens or load.engine_tokens or load.decoding:
                queue = model.queue_seconds(load, now) * model.factor
            ahead = queue + model.each * load.requests
            requests += load.requests
            local, lacks = held if held < useful else useful, 1
            if held:
                self.holders += 1
                lacks = -local
            self.takers.append(Taker((lacks, ahead, name < pivot, name), queue, local, model, candidate))
        self.takers.sort(key=_RANK)
        self.best_available = available if available < useful else useful
        self._hot = prompt.rate > 0 and self.best_available > 0
        self._chance = _by_chance(requests, len(self.takers))

    def delay(self, taker: Taker) -> float:
        """Seconds that are its own on `taker`: its queue, and how much its decodes slow each other down."""
        return taker.queue_seconds + self._crowd(taker.model, taker.candidate.load)

    def best_option(self, taker: Taker) -> Option:
        """Return the best option on `taker`; an import only if it is faster than computing."""
        candidate, model, local, queue = taker.candidate, taker.model, taker.local, taker.queue_seconds
        load, slowdown, tokens = candidate.load, model.factor, self._prompt.tokens
        prefill, others_wait = self._computing(model, load, local)
        score, transfer, computing, cached = prefill + others_wait, 0.0, prefill, local
        source, action = None, _HIT if local else _RECOMPUTE
        if (self._held_most > local and candidate.exchanges_with) or candidate.tier_tokens > local:
            for readable in self._readable(candidate, local):
                way = self._import(model, candidate, local, readable)
                if way[0] < score and way[1] + way[2] < prefill:
                    score, transfer, computing, cached, source, action = way
        later = 0.0
        ahead_tokens = load.tokens if load.tokens > load.engine_tokens else load.engine_tokens
        if tokens - local + ahead_tokens > candidate.room_tokens:
            later = self._evictions(model, tokens - local)
        if self._hot:
            as_now, with_a_copy = model.waits or self._waits(model)
            if local:
                later += as_now
            else:  # what a copy saves later requests pays for what it evicts
                spared = (as_now - with_a_copy) * self._prompt.rate * FADE_SECONDS
                later = max(0.0, later - spared) + with_a_copy
        return Option(
            replica=candidate.name,
            source=source.name if source is not None else None,
            action=action,
            import_tokens_max=cached if action is _SPLIT else None,
            expected=Expected(
                queue_seconds=queue,
                transfer_seconds=transfer * slowdown,
                prefill_seconds=computing * slowdown,
                local_tokens=local,
                peer_tokens=cached - local,
                computed_tokens=tokens - cached,
            ),
            score=(score + later) * slowdown + queue + self._crowd(model, load),
        )

    def _crowd(self, model: ModelTimes, load: ReplicaLoad) -> float:
        return model.each * (load.requests - self._chance) if load.requests > self._chance else 0.0

    def _computing(self, model: ModelTimes, load: ReplicaLoad, cached: int) -> tuple[float, float]:
        """Seconds of computing what is behind `cached`, and what that costs others.

        They are as much for each request that waits there, as all wait longer.
        """
        known = model.reckoned.get(cached)
        if known is None:
            known = model.reckoned[cached] = model.computing(cached, self._prompt.tokens)
        prefill, work = known
        if load.decoding:
            prefill += model.slowed_seconds(load.decoding, self._prompt.tokens - cached)
        return prefill, load.waiting * work

    def _readable(self, taker: Candidate, local: int) -> list[Candidate]:
        if not self._sources_ranked:
            self._sources.sort(key=lambda holder: (-holder.held_tokens, holder.load.reading, holder.name))
            self._sources_ranked = True
        found: list[Candidate] = []
        for source in self._sources:
            if source.held_tokens <= local or len(found) == SOURCES_MAX:
                break
            if source.name in taker.exchanges_with and source.name != taker.name:
                found.append(source)
        if taker.tier_tokens > local:
            found.append(taker.stored())
        return found

    def _import(self, model: ModelTimes, taker: Candidate, local: int, source: Candidate) -> _Way:
        """Return the best way to import from `source`: all it holds, or up to where computing the rest starts to cost.

        The time is linear or concave in the cut on both sides of that place, so the best cut is there or at an end.
        """
        transport = source.transport if source.node == taker.node else REMOTE_TRANSPORT
        fixed, a_token = self._costs.transfer_terms(taker.name, source.name, transport, taker.key.device)
        a_token *= 1 + max(taker.load.importing, source.load.reading)
        held = min(source.held_tokens, self._useful)
        whole = self._way(model, taker, fixed + a_token * (held - local), held, source, _PULL)
        size = self._prompt.block_size
        cut = (self._prompt.tokens - model.free_tokens) // size * size
        if not local < cut < held:
            return whole
        split = self._way(model, taker, fixed + a_token * (cut - local), cut, source, _SPLIT)
        return split if split[0] < whole[0] - SPLIT_GAIN_SECONDS_MIN else whole

    def _way(
        self, model: ModelTimes, taker: Candidate, transfer: float, cached: int, source: Candidate, action: Choice
    ) -> _Way:
        prefill, others_wait = self._computing(model, taker.load, cached)
        return transfer + prefill + others_wait, transfer, prefill, cached, source, action

    def _evictions(self, model: ModelTimes, new: int) -> float:
        """Return the later cost of a full cache evicting others' KV for the part of the prompt it lacks, computed or copied.

        All of it or nothing: whichever of the full ones has a little room would get everything.
        """
        if model.again is None:  # seconds for each token given up, to compute it again if it must be, for all that will wait
            waiting = sum(candidate.load.waiting for candidate in self._candidates) / len(self._candidates)
            model.again = model.work_seconds(*self._prompt.again) * (1 + waiting)
        return new * model.again

    def _waits(self, model: ModelTimes) -> tuple[float, float]:
        """Return the expected wait of further requests for a hot prefix, now and once one more replica holds it."""
        prompt, available, holders = self._prompt, self.best_available, len(self._sources) or 1
        new = prompt.tokens - available
        service = model.work_seconds(new, pairs(available, new)) + prompt.decode_seconds / model.decodes_full
        demand = prompt.rate * service
        model.waits = _queueing(service, demand / holders), _queueing(service, demand / (holders + 1))
        return model.waits


def _queueing(service: float, busy: float) -> float:
    """Return the mean wait at a server that takes `service` seconds each and is `busy` that share of the time (M/D/1)."""
    if busy > BUSY_MAX:
        busy = BUSY_MAX
    return service * busy / (2 * (1 - busy))


def _by_chance(requests: int, replicas: int) -> float:
    """Return how many requests a replica may have by chance: two standard deviations above the mean (Poisson).

    Such a difference disappears by itself. A copy of a prefix made because of it would stay and evict others.
    """
    if not replicas:
        return 0.0
    mean = requests / replicas
    return mean + CHANCE_DEVIATIONS * sqrt(mean)
