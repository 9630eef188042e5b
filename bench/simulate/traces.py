"""Requests to play: traces in Mooncake's format, scaled and multiplied, and conversations generated from a seed."""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MOONCAKE_BLOCK_TOKENS = 512
SYSTEM_SHARE = 0.1
"""A leading block in more than this share of the requests belongs to a system prompt, not to a conversation."""


class TraceRefused(Exception):
    """A trace cannot be read; the message says where and why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`blocks` name the prompt's content in blocks of the trace's size, the last one possibly partial: equal names, equal
    content and equal content before it. `session` is the same for the turns of a conversation, as far as the trace tells.
    """

    arrival: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    session: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests by time of arrival."""

    name: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]

    @property
    def seconds(self) -> float:
        """Time from zero to the last arrival."""
        return self.requests[-1].arrival if self.requests else 0.0

    @property
    def prompt_tokens(self) -> int:
        """Sum over all requests."""
        return sum(request.prompt_tokens for request in self.requests)


def read_mooncake(path: Path, *, requests_max: int | None = None) -> Trace:
    """Read JSON lines with `timestamp` (ms), `input_length`, `output_length` and `hash_ids` (one for each 512 tokens).

    The format: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces. Raises TraceRefused.
    """
    rows: list[TraceRequest] = []
    try:
        with path.open() as lines:
            for number, line in enumerate(lines, 1):
                if requests_max is not None and len(rows) >= requests_max:
                    break
                rows.append(_mooncake_request(json.loads(line), f"{path}:{number}"))
    except (OSError, ValueError) as error:
        raise TraceRefused(f"{path}: {error}") from error
    if not rows:
        raise TraceRefused(f"{path}: no requests")
    rows.sort(key=lambda request: request.arrival)
    return with_sessions(Trace(path.stem, MOONCAKE_BLOCK_TOKENS, tuple(rows)))


def _mooncake_request(row: object, where: str) -> TraceRequest:
    if not isinstance(row, dict):
        raise TraceRefused(f"{where}: not an object")
    try:
        prompt, output, blocks = int(row["input_length"]), int(row["output_length"]), tuple(map(int, row["hash_ids"]))
        arrival = float(row["timestamp"]) / 1000
    except (KeyError, TypeError, ValueError) as error:
        raise TraceRefused(f"{where}: {error!r}") from error
    if prompt < 1 or arrival < 0 or len(blocks) != -(-prompt // MOONCAKE_BLOCK_TOKENS):
        raise TraceRefused(f"{where}: {prompt} tokens with {len(blocks)} hash ids at {arrival} s")
    return TraceRequest(arrival, prompt, max(1, output), blocks, 0)


def with_sessions(trace: Trace) -> Trace:
    """Name each request's session: its first block behind those that are a system prompt's."""
    common = system_blocks(trace.requests)
    return replace(trace, requests=tuple(replace(request, session=_session(request, common)) for request in trace.requests))


def system_blocks(requests: Sequence[TraceRequest]) -> frozenset[int]:
    """Return the blocks that occur in so many requests that they must belong to a system prompt."""
    counts = Counter(block for request in requests for block in request.blocks)
    return frozenset(block for block, count in counts.items() if count > max(1, SYSTEM_SHARE * len(requests)))


def _session(request: TraceRequest, common: frozenset[int]) -> int:
    return next((block for block in request.blocks if block not in common), request.blocks[-1])


def scaled(trace: Trace, *, rate: float = 1.0, copies: int = 1, seed: int = 0, copy_offset_seconds: float = 60.0) -> Trace:
    """Return the trace played `rate` times as fast, by `copies` groups of users at once.

    Requests with one timestamp (Mooncake's are rounded to 3 s) are spread at random until the next timestamp. A copy has
    blocks of its own, except those of system prompts, and begins up to `copy_offset_seconds` of the trace's time later.
    """
    if rate <= 0 or copies < 1:
        raise ValueError(f"rate {rate} and copies {copies} must be positive")
    common = system_blocks(trace.requests)
    stride = 1 + max(max(request.blocks) for request in trace.requests)
    until = _next_timestamps(trace.requests)
    played: list[TraceRequest] = []
    for copy in range(copies):
        chance = random.Random(f"{seed}/{copy}")
        offset = chance.uniform(0.0, copy_offset_seconds) if copy else 0.0
        for request, following in zip(trace.requests, until, strict=True):
            arrival = (offset + chance.uniform(request.arrival, following)) / rate
            blocks = request.blocks if not copy else tuple(b if b in common else b + copy * stride for b in request.blocks)
            session = request.session if request.session in common else request.session + copy * stride
            played.append(TraceRequest(arrival, request.prompt_tokens, request.output_tokens, blocks, session))
    played.sort(key=lambda request: (request.arrival, request.blocks))
    return replace(trace, requests=tuple(played))


def _next_timestamps(requests: Sequence[TraceRequest]) -> list[float]:
    following, found, upcoming = requests[-1].arrival, [], requests[-1].arrival
    for request in reversed(requests):
        if request.arrival < following:
            upcoming, following = following, request.arrival
        found.append(max(upcoming, request.arrival))
    return found[::-1]


@dataclass(frozen=True, slots=True)
class Conversations:
    """The shape of generated traffic: users hold conversations of `turns`; each prompt extends the previous one."""

    conversations: int = 100
    turns: int = 4
    system_blocks: int = 1
    blocks_each_turn: tuple[int, int] = (1, 8)
    output_tokens: tuple[int, int] = (20, 300)
    requests_second: float = 4.0
    pause_seconds: float = 20.0  # between a conversation's turns, on average


def made_up(shape: Conversations, seed: int, *, block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> Trace:
    """Return a trace of random conversations, the same for the same seed."""
    chance = random.Random(seed)
    names = iter(range(shape.system_blocks, 1 << 62))
    system = tuple(range(shape.system_blocks))
    starts_second = shape.requests_second / shape.turns
    requests: list[TraceRequest] = []
    start = 0.0
    for _ in range(shape.conversations):
        start += chance.expovariate(starts_second)
        requests.extend(_conversation(shape, chance, names, system, start, block_tokens))
    requests.sort(key=lambda request: (request.arrival, request.blocks))
    return with_sessions(Trace("made-up", block_tokens, tuple(requests)))


def _conversation(
    shape: Conversations, chance: random.Random, names: Iterable[int], system: tuple[int, ...], start: float, block_tokens: int
) -> list[TraceRequest]:
    blocks, now, turns = system, start, []
    fresh = iter(names)
    for _ in range(shape.turns):
        blocks = (*blocks, *(next(fresh) for _ in range(chance.randint(*shape.blocks_each_turn))))
        tail = chance.randint(1, block_tokens - 1)
        prompt = len(blocks) * block_tokens + tail
        turns.append(TraceRequest(now, prompt, chance.randint(*shape.output_tokens), (*blocks, next(fresh)), 0))
        now += chance.expovariate(1 / shape.pause_seconds)
    return turns
