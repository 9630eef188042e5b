"""When requests arrive and what they share, for an open-loop run: nobody waits for an answer before asking again."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.cli.bench.words import Words

LOAD_SHARE = 0.6
"""The default rate, as a share of what the replicas could serve with one request after another."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that arrives `at` seconds into the run."""

    at: float
    prompt: str


def arrivals(source: random.Random, rate: float, seconds: float) -> list[float]:
    """Return Poisson arrivals at `rate` per second: times from 0 to `seconds`."""
    times, now = [], source.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += source.expovariate(rate)
    return times


def shared_prefixes(
    source: random.Random, words: Words, times: Sequence[float], *, prefixes: int, prefix_tokens: int, suffix_tokens: int
) -> list[Arrival]:
    """Return a request at each of `times`: one of `prefixes` beginnings, all equally likely, and an ending of its own."""
    beginnings = [words.text(prefix_tokens) for _ in range(prefixes)]
    return [Arrival(at, f"{source.choice(beginnings)} {words.text(suffix_tokens)}") for at in times]


def modest_rate(replicas: int, seconds_each: float) -> float:
    """Return LOAD_SHARE of the rate that `replicas` can serve at `seconds_each` per request, to two digits."""
    return float(f"{LOAD_SHARE * replicas / seconds_each:.2g}")
