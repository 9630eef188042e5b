"""Requests that wait for their turn: by class, and within one in shares of equal size for each tenant. Pure.

The shares are of tokens, by deficit round robin (Shreedhar and Varghese, 1996): in each round a tenant may take a quantum more,
and what its next request lacks it saves up. So a tenant with many or large requests waits for itself, not others for it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from typing import NamedTuple

from gateway.tenants.keys import CLASSES

TOKENS_MIN = 64
"""So much a request counts at least: also one whose prompt is cached takes its turn."""
QUANTUM_TOKENS = TOKENS_MIN
"""Of one round: with more, a tenant of small requests would send several of them before the next tenant's turn."""


class Place(NamedTuple):
    """One that waits. `displaced` is the number of another one that lost its place to it, if the queue was full."""

    number: int
    displaced: int | None


class _Waiting(NamedTuple):
    number: int
    tokens: int


class _Class:
    """The tenants of one class in the order of their turns, each with its requests and what it has saved up."""

    def __init__(self) -> None:
        self.tenants: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self.saved: dict[str, int] = {}

    def take(self) -> _Waiting:
        """The next one. Call it only if one waits."""
        tenants, saved = self.tenants, self.saved
        # The rounds in which nobody could go are counted rather than gone through.
        rounds = min(-(-(waiting[0].tokens - saved[name]) // QUANTUM_TOKENS) for name, waiting in tenants.items())
        if rounds > 1:
            for name in tenants:
                saved[name] += (rounds - 1) * QUANTUM_TOKENS
        while True:
            name, waiting = next(iter(tenants.items()))
            if saved[name] >= waiting[0].tokens:
                found = waiting.popleft()
                saved[name] -= found.tokens
                if not waiting:
                    self.forget(name)
                return found
            saved[name] += QUANTUM_TOKENS
            tenants.move_to_end(name)

    def forget(self, tenant: str) -> None:
        """A tenant without requests saves nothing."""
        del self.tenants[tenant], self.saved[tenant]


class FairQueue:
    """At most `requests_max`. If it is full, the last one of the tenant with most waiting in the lowest class gives way."""

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._classes = tuple(_Class() for _ in CLASSES)
        self._of: dict[int, tuple[str, int]] = {}  # tenant and class by number
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._of)

    def ahead_of(self, tenant: str, rank: int) -> int:
        """About how many go before the next request of a tenant in a class.

        All of the classes before that one; in it the tenant's own, and as many of each other tenant.
        """
        before = sum(len(waiting) for of_class in self._classes[:rank] for waiting in of_class.tenants.values())
        tenants = self._classes[rank].tenants
        own = len(tenants.get(tenant, ()))
        return before + sum(min(len(waiting), own + 1) for name, waiting in tenants.items() if name != tenant) + own

    def put(self, tenant: str, rank: int, tokens: int) -> Place | None:
        """Have a request wait, `rank` being its place in CLASSES; None if there is no place for it."""
        displaced = None
        if len(self._of) >= self._requests_max:
            displaced = self._give_way(tenant, rank)
            if displaced is None:
                return None
        number = next(self._numbers)
        self._of[number] = tenant, rank
        of_class = self._classes[rank]
        of_class.saved.setdefault(tenant, 0)
        of_class.tenants.setdefault(tenant, deque()).append(_Waiting(number, max(tokens, TOKENS_MIN)))
        return Place(number, displaced)

    def take(self) -> int | None:
        """The number of the next one, which waits no longer; None if nobody waits."""
        for of_class in self._classes:
            if of_class.tenants:
                number = of_class.take().number
                del self._of[number]
                return number
        return None

    def remove(self, number: int) -> bool:
        """One waits no longer, its client having left. False if it does not wait."""
        if number not in self._of:
            return False
        tenant, rank = self._of[number]
        of_class = self._classes[rank]
        waiting = of_class.tenants[tenant]
        waiting.remove(next(each for each in waiting if each.number == number))
        if not waiting:
            of_class.forget(tenant)
        del self._of[number]
        return True

    def _give_way(self, tenant: str, rank: int) -> int | None:
        """Take the last one away from the tenant that has most in the lowest class; None if nobody has to give way.

        In `rank`'s own class that tenant has to have more than `tenant`. A class that goes before it does not give way.
        """
        lowest = max((each for each, of_class in enumerate(self._classes) if of_class.tenants), default=-1)
        if lowest < rank:
            return None
        tenants = self._classes[lowest].tenants
        name = max(tenants, key=lambda each: len(tenants[each]))
        if lowest == rank and len(tenants[name]) <= len(tenants.get(tenant, ())) + 1:
            return None
        number = tenants[name][-1].number
        self.remove(number)
        return number
