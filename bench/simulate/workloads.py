"""Workloads for caches that are too small, from a seed: prefixes that many share, a hot one, conversations. 1 request/s."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count

from bench.simulate.profiles import Profile
from bench.simulate.traces import Trace, TraceRequest, with_sessions

SHARED_FACTOR = 1.4
"""Total tokens of the shared prefixes, in multiples of one replica's cache."""
HOT_SHARE = 0.6
"""Share of the requests that begin with the hot prefix; the others share nothing."""
TURNS = 4


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """Sizes in tokens. A turn adds `turn_tokens` and comes `think_requests` mean request intervals after the previous one."""

    block_tokens: int
    cache_tokens: int
    prefix_tokens: int
    suffix_tokens: int
    answer_tokens: int
    background_tokens: int
    turn_tokens: int
    think_requests: float = 4.0


CPU_SHAPE = WorkloadShape(32, 128 * 32, 480, 32, 6, 150, 60)
GPU_SHAPE = WorkloadShape(16, 16384 * 16, 24_000, 200, 48, 4_000, 4_000)
"""The shapes that bench.field also plays to real replicas."""


def shape_for(profile: Profile) -> WorkloadShape:
    """Return the sizes for this kind of engine, with its own blocks and caches."""
    engine = profile.engine
    base = CPU_SHAPE if profile.on_cpu else GPU_SHAPE
    return replace(base, block_tokens=engine.block_tokens, cache_tokens=engine.kv_tokens)


class _Texts:
    """Names for blocks of content that nobody has used yet."""

    def __init__(self, block_tokens: int) -> None:
        self._names = count(1)
        self._block_tokens = block_tokens

    def take(self, tokens: int) -> tuple[int, ...]:
        return tuple(next(self._names) for _ in range(-(-tokens // self._block_tokens)))


Maker = Callable[[WorkloadShape, _Texts, random.Random, Iterator[float]], Iterator[TraceRequest]]


def _shared(shape: WorkloadShape, texts: _Texts, chance: random.Random, arrivals: Iterator[float]) -> Iterator[TraceRequest]:
    prefixes = [
        texts.take(shape.prefix_tokens) for _ in range(max(2, round(SHARED_FACTOR * shape.cache_tokens / shape.prefix_tokens)))
    ]
    for at in arrivals:
        yield _behind(chance.choice(prefixes), at, shape, texts)


def _hot(shape: WorkloadShape, texts: _Texts, chance: random.Random, arrivals: Iterator[float]) -> Iterator[TraceRequest]:
    prefix = texts.take(shape.prefix_tokens)
    for at in arrivals:
        if chance.random() < HOT_SHARE:
            yield _behind(prefix, at, shape, texts)
        else:
            tokens = shape.background_tokens
            yield TraceRequest(at, tokens, shape.answer_tokens, texts.take(tokens), 0)


def _conversations(
    shape: WorkloadShape, texts: _Texts, chance: random.Random, arrivals: Iterator[float]
) -> Iterator[TraceRequest]:
    for place, start in enumerate(arrivals):
        if place % TURNS:
            continue  # so that on average one turn arrives per second
        at, blocks = start, texts.take(3 * shape.turn_tokens)
        for _ in range(TURNS):
            yield TraceRequest(at, len(blocks) * shape.block_tokens, shape.answer_tokens, blocks, 0)
            at += chance.expovariate(1 / shape.think_requests)
            blocks = (*blocks, *texts.take(shape.turn_tokens + shape.answer_tokens))


def _behind(prefix: tuple[int, ...], at: float, shape: WorkloadShape, texts: _Texts) -> TraceRequest:
    blocks = (*prefix, *texts.take(shape.suffix_tokens))
    tokens = len(prefix) * shape.block_tokens + shape.suffix_tokens
    return TraceRequest(at, tokens, shape.answer_tokens, blocks, 0)


_MAKERS: Mapping[str, Maker] = {"shared": _shared, "hot": _hot, "conversations": _conversations}
WORKLOADS = tuple(_MAKERS)


def workload(name: str, shape: WorkloadShape, requests: int, seed: int) -> Trace:
    """Return the workload's trace, the same for the same seed: Poisson arrivals, one per second. Raises KeyError."""
    chance = random.Random(f"{name}/{seed}")
    made = sorted(
        _MAKERS[name](shape, _Texts(shape.block_tokens), chance, _arrivals(chance, requests)),
        key=lambda request: (request.arrival, request.blocks),
    )
    return with_sessions(Trace(name, shape.block_tokens, tuple(made)))


def _arrivals(chance: random.Random, requests: int) -> Iterator[float]:
    now = 0.0
    for _ in range(requests):
        now += chance.expovariate(1.0)
        yield now
