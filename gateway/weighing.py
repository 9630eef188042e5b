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


class Weighing:
    """Weighs `candidates` for `prompt` at `now`, CLOCK_MONOTONIC seconds."""

    def __init__(self, prompt: PromptView, candidates: Sequence[Candidate], costs: CostModel, now: float) -> None:
        self._prompt = prompt
        self._costs = costs
        self._now = now
        self._useful = max(0, prompt.tokens - 1)  # at least one token is always computed
        self._candidates = candidates
        self._prefills: dict[tuple[ModelKey, int], float] = {}
        self._works: dict[tuple[ModelKey, int], float] = {}
        sources = [candidate for candidate in candidates if candidate.held_tokens > 0]
        sources.sort(key=lambda holder: (-holder.held_tokens, holder.load.reading, holder.name))
        self._sources = sources
        self._paces: dict[ModelKey, float] = {}
        self._waits: dict[tuple[ModelKey, bool], float] = {}
        self._again: dict[ModelKey, float] = {}
        promised = max((candidate.promise.tokens for candidate in candidates if candidate.promise is not None), default=0)
        self.best_available = min(max(promised, sources[0].held_tokens if sources else 0), self._useful)

    def takers(self, turn: int) -> tuple[list[Taker], list[Taker]]:
        """Return all replicas that may get the request: those with some of the prefix, and the others.

        By rank, holders of more come first, then those with less in front of the request; `turn` rotates among equals.
        """
        costs, now, decode_seconds, useful = self._costs, self._now, self._prompt.decode_seconds, self._useful
        names = [candidate.name for candidate in self._candidates]
        chance = _by_chance([candidate.load.requests for candidate in self._candidates if candidate.takes])
        pivot = sorted(names)[turn % len(names)] if names else ""
        holding: list[Taker] = []
        others: list[Taker] = []
        for candidate in self._candidates:
            name, held, load, _, key, _, promise, takes, _, _ = candidate
            if not takes:
                continue
            queue = costs.queue_seconds(key, load, now) * self._pace(key) if load.busy else 0.0
            ahead, crowd = queue, 0.0
            if load.requests and decode_seconds:
                each = decode_seconds * self._pace(key) / device_kind(key).decodes_full
                ahead, crowd = queue + each * load.requests, each * max(0.0, load.requests - chance)
            if promise is not None and promise.tokens > held:
                held = promise.tokens
            if held:
                local = min(held, useful)
                holding.append(Taker((-local, ahead, name < pivot, name), queue, crowd, local, candidate))
            else:
                others.append(Taker((0, ahead, name < pivot, name), queue, crowd, 0, candidate))
        return holding, others

    def best_option(self, taker: Taker) -> Option:
        """The best that can be done on `taker`; an import only if it is sooner than computing."""
        candidate, local = taker.candidate, taker.local_tokens
        prefill = self._prefill(candidate, local)
        best = _Way(
            prefill + _price(candidate) * self._work(candidate.key, local),
            0.0,
            prefill,
            local,
            None,
            Action.HIT if local else Action.RECOMPUTE,
        )
        for source in self._readable(candidate, local):
            way = self._import(candidate, local, source)
            if way.score < best.score and way.transfer + way.prefill < prefill:
                best = way
        peer = best.cached - local
        pace = self._pace(candidate.key)
        expected = Expected(
            taker.queue_seconds,
            best.transfer * pace,
            best.prefill * pace,
            local,
            peer,
            self._prompt.tokens - best.cached,
        )
        later = self._evictions(candidate, local)
        if self._prompt.rate > 0 and self.best_available:
            wait = self._wait(candidate.key, local == 0)
            if later and not local:  # what a copy spares those who ask for it soon pays for what it pushes out
                spared = self._wait(candidate.key, one_more=False) - wait
                later = max(0.0, later - spared * self._prompt.rate * FADE_SECONDS)
            later += wait
        score = (best.score + later) * pace + taker.queue_seconds + taker.crowd_seconds
        return Option(
            candidate.name,
            best.source.name if best.source is not None else None,
            best.action,
            best.cached if best.action is Action.SPLIT else None,
            expected,
            score,
        )

    def _readable(self, taker: Candidate, local: int) -> list[Candidate]:
        found: list[Candidate] = []
        for source in self._sources:
            if source.held_tokens <= local or len(found) == SOURCES_MAX:
                break
            if source.name in taker.exchanges_with and source.name != taker.name:
                found.append(source)
        return found

    def _import(self, taker: Candidate, local: int, source: Candidate) -> _Way:
        """The best way to import from `source`: all it holds, or the head up to where computing the rest begins to cost.

        The time is linear or concave in the cut on both sides of that place, so the best cut is there or at an end.
        """
        transport = source.transport if source.node == taker.node else REMOTE_TRANSPORT
        fixed, a_token = self._costs.transfer_terms(taker.name, source.name, transport, taker.key.device)
        a_token *= 1 + max(taker.load.importing, source.load.reading)
        held = min(source.held_tokens, self._useful)
        transfer, prefill = fixed + a_token * (held - local), self._prefill(taker, held)
        whole = _Way(
            transfer + prefill + _price(taker) * self._work(taker.key, held), transfer, prefill, held, source, Action.PULL
        )
        size = self._prompt.block_size
        cut = (self._prompt.tokens - self._costs.free_tokens(taker.key)) // size * size
        if not local < cut < held:
            return whole
        transfer, prefill = fixed + a_token * (cut - local), self._prefill(taker, cut)
        split = _Way(
            transfer + prefill + _price(taker) * self._work(taker.key, cut), transfer, prefill, cut, source, Action.SPLIT
        )
        return split if split.score < whole.score - SPLIT_GAIN_SECONDS_MIN else whole

    def _prefill(self, taker: Candidate, cached: int) -> float:
        key, new = taker.key, self._prompt.tokens - cached
        known = self._prefills.get((key, cached))
        if known is None:
            known = self._prefills[key, cached] = self._costs.prefill_seconds(key, cached, new)
        decoding = taker.load.decoding
        return known + self._costs.terms(key).decode_step * decoding * new / CHUNK_TOKENS if decoding else known

    def _work(self, key: ModelKey, cached: int) -> float:
        known = self._works.get((key, cached))
        if known is None:
            new = max(0, self._prompt.tokens - cached - self._costs.free_tokens(key))
            known = self._works[key, cached] = self._costs.work_seconds(key, new, pairs(cached, new))
        return known

    def _pace(self, key: ModelKey) -> float:
        """One factor for all replicas with that model: it changes what is expected, and nothing in whom it is expected of."""
        known = self._paces.get(key)
        if known is None:
            known = self._paces[key] = self._costs.pace(key, self._now)
        return known

    def _evictions(self, taker: Candidate, local: int) -> float:
        """What it costs later that a full cache gives up others' KV for what it lacks of the prompt, however that comes.

        All of it or nothing: whichever of the full ones has a little room would get everything.
        """
        room = taker.room_tokens
        if room == inf:
            return 0.0
        new, load = self._prompt.tokens - local, taker.load
        if new + max(load.tokens, load.engine_tokens) <= room:
            return 0.0
        return new * self._a_token_again(taker.key)

    def _a_token_again(self, key: ModelKey) -> float:
        """Seconds for each token given up: those that it takes to compute it again if it must be, for all that will wait."""
        known = self._again.get(key)
        if known is None:
            waiting = sum(candidate.load.waiting for candidate in self._candidates) / len(self._candidates)
            seconds = self._costs.work_seconds(key, *self._prompt.again)
            known = self._again[key] = seconds * (1 + waiting)
        return known

    def _wait(self, key: ModelKey, one_more: bool) -> float:
        """The wait to expect of further requests for a hot prefix: less once one replica more holds it."""
        known = self._waits.get((key, one_more))
        if known is None:
            prompt, available = self._prompt, self.best_available
            new = prompt.tokens - available
            work = self._costs.work_seconds(key, new, pairs(available, new))
            service = work + prompt.decode_seconds / device_kind(key).decodes_full
            busy = min(prompt.rate * service / (max(1, len(self._sources)) + one_more), BUSY_MAX)
            known = self._waits[key, one_more] = service * busy / (2 * (1 - busy))  # M/D/1
        return known


def _price(taker: Candidate) -> float:
    """What a second of computing costs others: one for each request that waits there, as they all wait that much longer."""
    return float(taker.load.waiting)


def _by_chance(requests: Sequence[int]) -> float:
    """How many requests a replica may well have without any reason: two standard deviations above the mean (Poisson).

    Such a difference goes as it came. A copy of a prefix made for it would stay, and push others out of the cache.
    """
    mean = sum(requests) / max(1, len(requests))
    return mean + CHANCE_DEVIATIONS * sqrt(mean)
