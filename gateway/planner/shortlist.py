"""Which replicas a request is weighed on where there are many: the best holders, and a few that have little to do. Pure."""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice

from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.scoring import HOLDERS_MAX, TAKERS_MAX

ALL_MAX = 64
"""Up to so many ready replicas each is weighed."""
LOOKED_AT_MAX = 48
"""Replicas whose load is looked at for a request: the next in turn, so that each comes by. The least busy of so many are, for
all that matters, as idle as the least busy of all (the power of several choices)."""
HOLDERS_LOOKED_AT_MAX = 2 * HOLDERS_MAX
PROMISES_MAX = HOLDERS_MAX


def window(names: Sequence[str], turn: int) -> list[str]:
    """Return the names that are looked at in this turn: over the turns all of them, each equally often."""
    begin = turn * LOOKED_AT_MAX % len(names)
    found = list(names[begin : begin + LOOKED_AT_MAX])
    return found + list(names[: min(LOOKED_AT_MAX, len(names)) - len(found)])


def best_first(first: Iterable[str], promises: Mapping[str, int], holders: Iterable[str]) -> list[str]:
    """Return the replicas that have much of a prompt, each once: `first`; of those that compute some of it, by tokens in
    `promises`, PROMISES_MAX; then `holders`, which are in the order of what they hold; no more in all than a short list has
    room for."""
    computing: Iterable[str] = promises
    if len(promises) > PROMISES_MAX:
        computing = heapq.nlargest(PROMISES_MAX, promises, key=promises.__getitem__)
    return list(dict.fromkeys(islice(chain(first, computing, holders), PROMISES_MAX + HOLDERS_LOOKED_AT_MAX)))


def shortlist(
    ready: Mapping[str, object], holders: Iterable[str], idle: Sequence[str], load: Callable[[str], ReplicaLoad]
) -> list[str]:
    """Return the ready replicas to weigh, each once: the first of `holders`, which are in the order of what they hold, and the
    least busy of `idle`."""
    found = list(islice((name for name in holders if name in ready), HOLDERS_LOOKED_AT_MAX))
    known = set(found)
    others = [name for name in idle if name in ready and name not in known]
    others.sort(key=lambda name: _busy(load(name)))
    return found + others[: 2 * TAKERS_MAX]


def _busy(load: ReplicaLoad) -> tuple[float, int]:
    return max(load.tokens, load.engine_tokens), load.requests
