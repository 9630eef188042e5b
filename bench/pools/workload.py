"""Many prefixes that requests share, some far more often than others, each time with a new question and a short answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.workloads import Talk, Turn
from gateway.cli.bench.words import Words


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prefix, a question, an answer."""

    prefix_tokens: int
    suffix_tokens: int
    answer_tokens: int


class SharedPrefixes:
    """`count` prefixes; how often one is asked for falls as 1 / rank ** `exponent` (Zipf)."""

    def __init__(self, count: int, exponent: float, lengths: Lengths, words: Words) -> None:
        self._lengths, self._words = lengths, words
        self._prefixes = [words.text(lengths.prefix_tokens) for _ in range(count)]
        self._weights = [1 / rank**exponent for rank in range(1, count + 1)]

    def fill(self, passes: int, beside: int, shape: random.Random) -> list[Talk]:
        """Ask for each prefix so many times, in a new order each time, `beside` requests at once."""
        order = [prefix for _ in range(passes) for prefix in shape.sample(self._prefixes, len(self._prefixes))]
        turns = [self._turn(prefix) for prefix in order]
        return [Talk(0.0, tuple(turns[first::beside])) for first in range(min(beside, len(turns)))]

    def step(self, rate: float, seconds: float, shape: random.Random) -> list[Talk]:
        """Ask round(rate * seconds) times, at random moments: a Poisson process of which the number is known."""
        times = sorted(shape.uniform(0, seconds) for _ in range(max(1, round(rate * seconds))))
        chosen: Sequence[str] = shape.choices(self._prefixes, self._weights, k=len(times))
        return [Talk(at, (self._turn(prefix),)) for at, prefix in zip(times, chosen, strict=True)]

    def _turn(self, prefix: str) -> Turn:
        return Turn(0.0, f"{prefix} {self._words.text(self._lengths.suffix_tokens)}", self._lengths.answer_tokens)


def prefixes_of(pool_tokens: int, share: float, prefix_tokens: int) -> int:
    """Return how many prefixes have `share` of the tokens that all regions of host memory hold together."""
    return max(2, round(share * pool_tokens / prefix_tokens))
