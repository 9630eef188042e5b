"""Workloads for a comparison: who asks what, and when. The seed fixes times and shapes for every arm; words differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.simulate.workloads import HOT_SHARE, SHARED_FACTOR, TURNS
from gateway.cli.bench.words import Words

HOT_RATE = 2.5
"""The hot workload's rate relative to the others: most of its prompts are cached."""
KNOWN_SHARE = 0.6
"""Total tokens of the prefixes that are known before the fleet changes, in parts of one replica's cache."""


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a workload. Lengths are in tokens, `rate` is in requests per second, over `seconds`.

    `turn_tokens` is what a user adds per turn of a conversation, `think_seconds` the mean pause before it. `cache_tokens` is
    what one replica's cache holds.
    """

    rate: float
    seconds: float
    prefix_tokens: int
    suffix_tokens: int
    answer_tokens: int
    background_tokens: int
    turn_tokens: int
    think_seconds: float
    cache_tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: after `pause` seconds, `text` is appended to the conversation so far."""

    pause: float
    text: str
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Talk:
    """Begins `at` seconds into the run; each turn waits for the previous answer. One turn and no chat: a completion."""

    at: float
    turns: tuple[Turn, ...]
    chat: bool = False


def arrivals(shape: random.Random, rate: float, seconds: float) -> list[float]:
    """Return Poisson arrivals: times from 0 to `seconds`."""
    times, now = [], shape.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += shape.expovariate(rate)
    return times


def shared(size: Size, shape: random.Random, words: Words) -> list[Talk]:
    """Use each prefix equally often, with new questions; together they have SHARED_FACTOR times one cache's tokens."""
    count = max(2, round(SHARED_FACTOR * size.cache_tokens / size.prefix_tokens))
    prefixes = [words.text(size.prefix_tokens) for _ in range(count)]
    return [
        _single(at, f"{shape.choice(prefixes)} {words.text(size.suffix_tokens)}", size)
        for at in arrivals(shape, size.rate, size.seconds)
    ]


def hot(size: Size, shape: random.Random, words: Words) -> list[Talk]:
    """Let HOT_SHARE of the requests begin with the same prefix; the others share nothing. HOT_RATE times the usual rate."""
    prefix = words.text(size.prefix_tokens)
    talks = []
    for at in arrivals(shape, HOT_RATE * size.rate, size.seconds):
        if shape.random() < HOT_SHARE:
            talks.append(_single(at, f"{prefix} {words.text(size.suffix_tokens)}", size))
        else:
            talks.append(_single(at, words.text(size.background_tokens), size))
    return talks


def conversations(size: Size, shape: random.Random, words: Words) -> list[Talk]:
    """Return chats of TURNS turns, each with the whole history; they start so that turns arrive at roughly the given rate."""
    talks = []
    for at in arrivals(shape, size.rate / TURNS, size.seconds):
        first = Turn(0.0, words.text(3 * size.turn_tokens), size.answer_tokens)
        more = [
            Turn(shape.expovariate(1 / size.think_seconds), words.text(size.turn_tokens), size.answer_tokens)
            for _ in range(TURNS - 1)
        ]
        talks.append(Talk(at, (first, *more), chat=True))
    return talks


def _single(at: float, text: str, size: Size) -> Talk:
    return Talk(at, (Turn(0.0, text, size.answer_tokens),))


@dataclass(frozen=True, slots=True)
class Workload:
    """A name and how its conversations are generated.

    A workload in which the fleet changes is for peerkv alone: `first` is posted to its admin API, the talks of `warm` are
    played, and the run begins as `then` is posted.
    """

    name: str
    talks: Callable[[Size, random.Random, Words], list[Talk]]
    warm: Callable[[Size, Words], list[Talk]] | None = None
    first: str = ""
    then: str = ""


def _known_prefixes(size: Size, words: Words) -> list[str]:
    """Return as many prefixes as KNOWN_SHARE of one replica's cache holds."""
    return [words.text(size.prefix_tokens) for _ in range(max(2, round(KNOWN_SHARE * size.cache_tokens / size.prefix_tokens)))]


def each_prefix(size: Size, words: Words) -> list[Talk]:
    """Use each prefix once, all at the same time."""
    return [_single(0.0, f"{prefix} {words.text(size.suffix_tokens)}", size) for prefix in _known_prefixes(size, words)]


def grown(size: Size, shape: random.Random, words: Words) -> list[Talk]:
    """Use the prefixes equally often, at HOT_RATE times the usual rate: more than one replica can serve."""
    return _questions(size, shape, words, HOT_RATE * size.rate)


def drained(size: Size, shape: random.Random, words: Words) -> list[Talk]:
    """Use the prefixes equally often."""
    return _questions(size, shape, words, size.rate)


def _questions(size: Size, shape: random.Random, words: Words, rate: float) -> list[Talk]:
    prefixes = _known_prefixes(size, words)
    return [
        _single(at, f"{shape.choice(prefixes)} {words.text(size.suffix_tokens)}", size)
        for at in arrivals(shape, rate, size.seconds)
    ]


WORKLOADS: Sequence[Workload] = (
    Workload("shared", shared),
    Workload("hot", hot),
    Workload("conversations", conversations),
    Workload("grown", grown, each_prefix, "/replicas/replica-1/drain", "/replicas/replica-1/resume"),
    Workload("drained", drained, each_prefix, "", "/replicas/replica-0/drain"),
)
