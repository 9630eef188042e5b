"""What evictions from full caches cost, learnt from what is requested again. Pure; times are in seconds.

A cache with room takes in a prompt for free. A full one evicts its least recently used token for each token that it takes in,
computed or copied. `again` says how much of such a token will have to be recomputed, from 0 to 1:

    again = SOONER * tokens requested again that nobody holds any more / tokens that all caches evicted

over about the last turnover, the time in which the caches evict as much as they hold. What another replica holds is not lost: a
copy may cheaply displace another copy, but not the only one. Of what was requested again, only what caches AGE_MAX times as
large would still hold counts: the rest would be gone whatever is decided now.

The price of a choice is the number of tokens it evicts, times `again`, times the time to compute a token (costs/), times the
mean number of requests waiting at a replica plus one, as they all wait that much longer.
"""

from collections.abc import Mapping
from math import exp, inf
from typing import NamedTuple

from gateway.block_registry.tables import Table
from transport.table.deliveries import Delivery

SOONER = 3.0
"""Taking something in not only evicts the oldest block, it also brings forward the eviction of every other block.

The loss is the rate at which blocks of that age are requested, times their age; the share requested again counts each once.
Prefixes requested at random lose 3 times as much, conversations 1 to 2 (measured in the simulator).
"""
AGE_MAX = 2.0
BELIEF = 0.1
"""In turnovers: the evictions assumed before anything was seen, all of them lost."""


class Again(NamedTuple):
    """What is recomputed for each evicted token: tokens, from 0 to 1, and attention pairs."""

    tokens: float
    pairs: float


NOTHING_AGAIN = Again(0.0, 0.0)


class Evictions:
    """Learns what caches evicted, and how much of it was missed. Belongs to one thread."""

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
        """Set the current replicas, with the tokens that their caches hold."""
        self._capacities = dict(capacities)
        self._capacity = sum(self._capacities.values())
        self._again = None

    def appeared(self, replica: str, table: Table) -> None:
        """A replica's table has appeared: its evictions count from now on, if it is new."""
        self._counted.setdefault(replica, (table.epoch, table.evicted_blocks() * table.block_size))

    def delivered(self, replica: str, table: Table, delivery: Delivery) -> None:
        """A replica served a request: check what it has evicted meanwhile."""
        epoch, tokens = table.epoch, table.evicted_blocks() * table.block_size
        if self._counted.get(replica) != (epoch, tokens):
            self.gave_up(replica, epoch, tokens, max(delivery.first_token_ns, delivery.arrived_ns) / 1e9)

    def gave_up(self, replica: str, epoch: int, tokens: int, now: float) -> None:
        """A replica's cache has evicted `tokens` since `epoch` began; when an epoch ends, everything it held is gone.

        Evictions before the first look are not counted: nobody knows when they happened or what was missed.
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
        now = max(now, self._since)  # replicas are polled one after the other, each for what came since
        self._seconds = self._seconds * fades + now - self._since
        self._since = now
        self._given_up = self._given_up * fades + new
        self._tokens *= fades
        self._pairs *= fades
        self._again = None

    def counts_since(self, now: float) -> float:
        """What was last requested at that time or later, and is no longer held, was evicted too early."""
        if not self._seconds:
            return -inf
        return now - AGE_MAX * self._capacity * self._seconds / self._given_up

    def missed(self, tokens: int, behind: int) -> None:
        """`tokens` after `behind` others, evicted too early, are recomputed."""
        self._tokens += tokens
        self._pairs += tokens * (behind + tokens / 2)
        self._again = None

    def again(self) -> Again:
        """Return the cost of each further evicted token; nothing while no cache is known."""
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
