"""One key's account: what it has used up, what its requests under way may come to, and what is too little. Pure."""

from __future__ import annotations

import enum
from typing import NamedTuple

import msgspec

from gateway.limits.budgets import Budget, day_of, month_of
from gateway.limits.windows import MinuteWindow
from gateway.tenants.keys import KeyLimits

SOON_SECONDS = 1.0
"""When to try again what only waits for others to end: nobody knows when they do."""


class Limit(enum.StrEnum):
    """What can be too little, by the name of its setting."""

    REQUESTS_PER_MINUTE = "requests_per_minute"
    REQUESTS_IN_FLIGHT = "requests_in_flight_max"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    TOKENS_IN_FLIGHT = "tokens_in_flight_max"
    TOKENS_PER_DAY = "tokens_per_day"
    TOKENS_PER_MONTH = "tokens_per_month"


class Shortage(NamedTuple):
    """Why a request cannot be served now: `asked` beside `used` is more than `allowed`.

    `seconds` is when it may be, None for never. `spent`: a budget is used up, rather than taken by requests under way.
    """

    limit: Limit
    allowed: int
    used: int
    asked: int
    seconds: float | None
    spent: bool = False


class Rate(msgspec.Struct, frozen=True, gc=False):
    """A limit as clients see it: so much, so much of it left, and so many seconds until all of it is."""

    limit: int
    remaining: int
    reset_seconds: float


class AccountState(msgspec.Struct):
    """What outlives the process."""

    requests: MinuteWindow = msgspec.field(default_factory=MinuteWindow)
    tokens: MinuteWindow = msgspec.field(default_factory=MinuteWindow)
    day: Budget = msgspec.field(default_factory=Budget)
    month: Budget = msgspec.field(default_factory=Budget)


class Account:
    """`running` requests are under way, and may come to `held_tokens`. Call `roll` before the rest, with the same `now`, unless
    that was done in the same `second`.
    """

    __slots__ = ("held_tokens", "running", "second", "state")

    def __init__(self, state: AccountState | None = None) -> None:
        self.state = AccountState() if state is None else state
        self.running = 0
        self.held_tokens = 0
        self.second = -1

    def roll(self, now: float) -> None:
        """Forget what no longer counts: minutes, days and months end with a second, so once in each is enough."""
        second, state = int(now), self.state
        if second == self.second:
            return
        self.second = second
        state.requests.roll(now)
        state.tokens.roll(now)
        if now >= state.day.ends or now < state.day.ends - 86400:
            state.day.roll(*day_of(now))
            state.month.roll(*month_of(now))

    def request_shortage(self, limits: KeyLimits, now: float) -> Shortage | None:
        """What keeps one more request from being begun, whatever its size."""
        state = self.state
        most = limits.requests_in_flight_max
        if most is not None and self.running >= most:
            return Shortage(Limit.REQUESTS_IN_FLIGHT, most, self.running, 1, SOON_SECONDS)
        most = limits.requests_per_minute
        if most is not None and (used := state.requests.total) >= most:
            return Shortage(Limit.REQUESTS_PER_MINUTE, most, used, 1, state.requests.frees(used + 1 - most, now))
        most = limits.tokens_per_day
        if most is not None and (used := state.day.spent) >= most:
            return Shortage(Limit.TOKENS_PER_DAY, most, used, 1, state.day.ends - now, spent=True)
        most = limits.tokens_per_month
        if most is not None and (used := state.month.spent) >= most:
            return Shortage(Limit.TOKENS_PER_MONTH, most, used, 1, state.month.ends - now, spent=True)
        return None

    def token_shortage(self, limits: KeyLimits, asked: int, now: float) -> Shortage | None:
        """What keeps a request of `asked` tokens from being served."""
        state, held = self.state, self.held_tokens
        most = limits.tokens_in_flight_max
        if most is not None and held + asked > most:
            return Shortage(Limit.TOKENS_IN_FLIGHT, most, held, asked, SOON_SECONDS if asked <= most else None)
        most, window = limits.tokens_per_minute, state.tokens
        if most is not None and (used := window.total + held) + asked > most:
            seconds = max(window.frees(used + asked - most, now), SOON_SECONDS) if asked <= most else None
            return Shortage(Limit.TOKENS_PER_MINUTE, most, used, asked, seconds)
        most = limits.tokens_per_day
        if most is not None and state.day.spent + held + asked > most:
            return self._budget_shortage(Limit.TOKENS_PER_DAY, most, state.day, asked, now)
        most = limits.tokens_per_month
        if most is not None and state.month.spent + held + asked > most:
            return self._budget_shortage(Limit.TOKENS_PER_MONTH, most, state.month, asked, now)
        return None

    def charge(self, tokens: int, now: float) -> int:
        """Count tokens as used; returns the second that they are counted in: that of the last `roll` if `now` is before it."""
        self.state.day.spent += tokens
        self.state.month.spent += tokens
        return self.state.tokens.add(tokens, max(now, self.second))

    def request_rate(self, limits: KeyLimits, now: float) -> Rate | None:
        """Of the limits on requests the one with the least left; None without any."""
        limit, left, reset = limits.requests_per_minute, 0, 0.0
        if limit is not None:
            window = self.state.requests
            left, reset = limit - window.total, window.empties(now)
        most = limits.requests_in_flight_max
        if most is not None and (limit is None or most - self.running < left):
            limit, left, reset = most, most - self.running, SOON_SECONDS if self.running else 0.0
        return None if limit is None else Rate(limit, max(0, left), reset)

    def token_rate(self, limits: KeyLimits, now: float) -> Rate | None:
        """Of the limits on tokens the one with the least left; None without any."""
        state, held = self.state, self.held_tokens
        waits = SOON_SECONDS if held else 0.0
        limit, left, reset = limits.tokens_per_minute, 0, waits
        if limit is not None:
            left, reset = limit - state.tokens.total - held, max(state.tokens.empties(now), waits)
        most = limits.tokens_in_flight_max
        if most is not None and (limit is None or most - held < left):
            limit, left, reset = most, most - held, waits
        most = limits.tokens_per_day
        if most is not None and (limit is None or most - state.day.spent - held < left):
            limit, left, reset = most, most - state.day.spent - held, state.day.ends - now
        most = limits.tokens_per_month
        if most is not None and (limit is None or most - state.month.spent - held < left):
            limit, left, reset = most, most - state.month.spent - held, state.month.ends - now
        return None if limit is None else Rate(limit, max(0, left), reset)

    def used(self, limit: Limit) -> int:
        """What counts towards a limit now."""
        state, held = self.state, self.held_tokens
        return {
            Limit.REQUESTS_PER_MINUTE: state.requests.total,
            Limit.REQUESTS_IN_FLIGHT: self.running,
            Limit.TOKENS_PER_MINUTE: state.tokens.total + held,
            Limit.TOKENS_IN_FLIGHT: held,
            Limit.TOKENS_PER_DAY: state.day.spent + held,
            Limit.TOKENS_PER_MONTH: state.month.spent + held,
        }[limit]

    def _budget_shortage(self, limit: Limit, most: int, budget: Budget, asked: int, now: float) -> Shortage:
        used = budget.spent + self.held_tokens
        if budget.spent + asked <= most:  # only others stand in the way, and may come to less
            return Shortage(limit, most, used, asked, SOON_SECONDS)
        return Shortage(limit, most, used, asked, budget.ends - now if asked <= most else None, spent=True)
