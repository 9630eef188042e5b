"""What it costs that full caches give up blocks, learnt from what is asked for again. Pure; times are in seconds.

A cache with room for a prompt takes it for nothing. A full one gives up, for each token that it takes in, computed or copied,
the one that was used least recently. Of such a token, `again` says how much will have to be computed again, from 0 to 1:

    again = SOONER * tokens asked for again that nobody holds any more / tokens that all caches gave up

over about the last turnover, the time in which the caches give up as much as they hold. What another replica holds is not lost:
copies may push copies out for little, but not what is single. Of what was asked for again, only what would still be there in
caches AGE_MAX times as large counts: the rest would be gone whatever is decided now.

The price of a choice is what it gives up, times `again`, times what computing a token takes (costs.py), times how many requests
wait at a replica in the mean and the one itself, as they all wait that much longer.
"""

from collections.abc import Mapping
from math import exp, inf
from typing import NamedTuple

from gateway.block_registry.tables import Table
from transport.table.deliveries import Delivery

SOONER = 3.0
"""Taking something in makes not only the oldest block go, but each block that stays go sooner, by as much.

What that loses is the rate at which blocks of that age are asked for, times their age; the share that is asked for again counts
each once. Prefixes asked for at random have 3 times as much, conversations 1 to 2 (measured in the simulator).
"""
AGE_MAX = 2.0
BELIEF = 0.1
"""In turnovers: so much is believed to have been given up, and all of it lost, before anything was seen."""


class Again(NamedTuple):
    """What is computed again for each token that is given up: tokens, from 0 to 1, and pairs of a new token and one before."""

    tokens: float
    pairs: float


NOTHING_AGAIN = Again(0.0, 0.0)


class Evictions:
    """Learns what caches gave up, and what of it was missed. Belongs to one thread."""

    def __init__(self) -> None:
        self._capacities: dict[str, int] = {}
        self._counted: dict[str, tuple[int, int]] = {}
        self._capacity = 0
        self._given_up = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        self._tokens = 0.0
        self._pairs = 0.0
        self._again: Again | None = None

    def caches(self, capacities: Mapping[str, int]) -> None:
        """These are the replicas now, with the tokens that their caches hold."""
        self._capacities = dict(capacities)
        self._capacity = sum(self._capacities.values())
        self._again = None

    def appeared(self, replica: str, table: Table) -> None:
        """A replica's table is here: what it gives up counts from now on, if it was not known before."""
        self._counted.setdefault(replica, (table.epoch, table.evicted_blocks() * table.block_size))

    def delivered(self, replica: str, table: Table, delivery: Delivery) -> None:
        """A replica served a request: see what it has given up meanwhile."""
        epoch, tokens = table.epoch, table.evicted_blocks() * table.block_size
        if self._counted.get(replica) != (epoch, tokens):
            self.gave_up(replica, epoch, tokens, max(delivery.first_token_ns, delivery.arrived_ns) / 1e9)

    def gave_up(self, replica: str, epoch: int, tokens: int, now: float) -> None:
        """A replica's cache gave up `tokens` since `epoch` began; with an epoch's end, all that it held is gone.

        What it had given up before it was first asked is not counted: nobody knows when, nor what of it was missed.
        """
        capacity = self._capacities.get(replica)
        if not capacity:
            return
        known = self._counted.get(replica)
        self._counted[replica] = (epoch, tokens)
        if known is None:
            return
        new = tokens - known[1] if known[0] == epoch else tokens + capacity
        if new <= 0:
            return
        fades = exp(-new / self._capacity)
        if self._since is None:
            self._since = now
        now = max(now, self._since)  # replicas are asked one after the other, each for what came since
        self._seconds = self._seconds * fades + now - self._since
        self._since = now
        self._given_up = self._given_up * fades + new
        self._tokens *= fades
        self._pairs *= fades
        self._again = None

    def counts_since(self, now: float) -> float:
        """What was asked for last at that time or later, and is not held any more, was given up too early."""
        if not self._seconds:
            return -inf
        return now - AGE_MAX * self._capacity * self._seconds / self._given_up

    def missed(self, tokens: int, behind: int) -> None:
        """`tokens` behind `behind` others, given up too early, are computed again."""
        self._tokens += tokens
        self._pairs += tokens * (behind + tokens / 2)
        self._again = None

    def again(self) -> Again:
        """For each token that is given up next; nothing before any cache is known."""
        if self._again is None:
            self._again = self._reckoned()
        return self._again

    def _reckoned(self) -> Again:
        believed = BELIEF * self._capacity
        if not believed:
            return NOTHING_AGAIN
        whole = self._given_up + believed
        tokens = (SOONER * self._tokens + believed) / whole
        behind = self._pairs / self._tokens if self._tokens else 0.0  # of each token missed
        return Again(min(1.0, tokens), min(1.0, tokens) * behind)
