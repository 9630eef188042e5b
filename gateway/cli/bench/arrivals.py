"""When requests come and what they share, for a run in which nobody waits for an answer before asking."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.cli.bench.words import Words

LOAD_SHARE = 0.6
"""Of what the replicas would do with one request after another, the rate that is offered where none is asked for."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes `at` seconds after the run's begin."""

    at: float
    prompt: str


def arrivals(source: random.Random, rate: float, seconds: float) -> list[float]:
    """Poisson arrivals at `rate` a second: times from 0 to `seconds`."""
    times, now = [], source.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += source.expovariate(rate)
    return times


def shared_prefixes(
    source: random.Random, words: Words, times: Sequence[float], *, prefixes: int, prefix_tokens: int, suffix_tokens: int
) -> list[Arrival]:
    """A request at each of `times`: one of `prefixes` beginnings, each as likely, and an end of its own."""
    beginnings = [words.text(prefix_tokens) for _ in range(prefixes)]
    return [Arrival(at, f"{source.choice(beginnings)} {words.text(suffix_tokens)}") for at in times]


def modest_rate(replicas: int, seconds_each: float) -> float:
    """LOAD_SHARE of what `replicas` do that take `seconds_each` for a request, to two digits."""
    return float(f"{LOAD_SHARE * replicas / seconds_each:.2g}")
