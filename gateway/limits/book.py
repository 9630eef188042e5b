"""The accounts of all keys, and the reservations of requests under way. Pure: takes `now`, Unix time in seconds.

What a request may come to is held before it is served, so that requests that run at once cannot overshoot together. Each
reservation ends once: it is settled with what was used, withdrawn, or runs out. A crash leaves none behind, since they are in
memory alone. Where several gateways share their limits, `shared/` asks a server of them all as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from gateway.limits.account import Account, AccountState, Shortage
from gateway.tenants.keys import Key

LATE_KEPT_MAX = 4096
"""Reservations that ran out, and can still be corrected by what was really used."""


class Reservation(msgspec.Struct, eq=False):
    """One request's part of its account. `tokens` are held; `second`, `day` and `month` are where they were charged, once
    the reservation has run out. `shared`: a server of several gateways has counted it ("there"), or could not ("here").
    `account` is the key's in the book.
    """

    id: int
    key: Key
    tokens: int
    began: int
    expires_at: float
    second: int = 0
    day: int = 0
    month: int = 0
    shared: Literal["", "here", "there"] = ""
    account: Account | None = None


class LimitBook:
    """A reservation that is not settled within `reservation_seconds` is charged as if all of it had been used."""

    def __init__(self, reservation_seconds: float) -> None:
        self._seconds = reservation_seconds
        self._accounts: dict[str, Account] = {}
        self._open: dict[int, Reservation] = {}  # in the order in which they run out
        self._none_expires_before = 0.0
        self._late: dict[int, Reservation] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        """How many reservations are held."""
        return len(self._open)

    def under_way(self) -> list[Reservation]:
        """The reservations that are held."""
        return list(self._open.values())

    def account(self, key: Key, now: float) -> Account:
        """The account of a key as it is now."""
        found = self._accounts.get(key.name)
        if found is None:
            found = self._accounts[key.name] = Account()
        if int(now) != found.second:
            found.roll(now)
        return found

    def begin(self, key: Key, now: float) -> Reservation | Shortage:
        """Count a request and hold its place; its tokens follow with `hold`."""
        if now >= self._none_expires_before:
            self.expire(now)
        account = self.account(key, now)
        short = account.request_shortage(key, now)
        if short is not None:
            return short
        account.running += 1
        number = next(self._numbers)
        began = account.state.requests.add(1, now)
        made = self._open[number] = Reservation(number, key, 0, began, now + self._seconds, account=account)
        return made

    def hold(self, number: int, tokens: int, now: float) -> Shortage | None:
        """Hold the tokens that a begun request may come to, once."""
        made = self._open.get(number)
        if made is None or made.tokens:
            return None
        account = self._of(made, now)
        short = account.token_shortage(made.key, tokens, now)
        if short is None:
            made.tokens = tokens
            account.held_tokens += tokens
        return short

    def settle(self, number: int, tokens: int, now: float) -> bool:
        """The request ended and used so many tokens. False if it was settled or withdrawn before: nothing changes then."""
        made = self._open.pop(number, None)
        if made is not None:
            account = self._of(made, now)
            account.running -= 1
            account.held_tokens -= made.tokens
            account.charge(tokens, now)
            return True
        made = self._late.pop(number, None)
        if made is None:
            return False
        account = self.account(made.key, now)
        excess, state = made.tokens - tokens, account.state
        if excess < 0:
            account.charge(-excess, now)
            return True
        state.tokens.take_back(made.second, excess)
        state.day.take_back(made.day, excess)
        state.month.take_back(made.month, excess)
        return True

    def withdraw(self, number: int, now: float) -> bool:
        """The request was not served and counts for nothing. False as for `settle`."""
        made = self._open.pop(number, None)
        if made is None:
            return False
        account = self._of(made, now)
        account.running -= 1
        account.held_tokens -= made.tokens
        account.state.requests.take_back(made.began, 1)
        return True

    def expire(self, now: float) -> None:
        """Charge what has run out."""
        while self._open:
            number, made = next(iter(self._open.items()))
            if made.expires_at > now:
                self._none_expires_before = made.expires_at
                return
            del self._open[number]
            account = self._of(made, now)
            account.running -= 1
            account.held_tokens -= made.tokens
            made.second = account.charge(made.tokens, now)
            made.day, made.month = account.state.day.period, account.state.month.period
            self._late[number] = made
            if len(self._late) > LATE_KEPT_MAX:
                del self._late[next(iter(self._late))]
        self._none_expires_before = now + self._seconds

    def keep(self, names: Iterable[str]) -> None:
        """Forget the accounts of all other keys, unless requests of theirs are under way."""
        kept = set(names)
        self._accounts = {name: each for name, each in self._accounts.items() if name in kept or each.running}

    def state(self) -> Mapping[str, AccountState]:
        """What is worth keeping across a restart, by the name of the key."""
        return {name: account.state for name, account in self._accounts.items()}

    def restore(self, state: Mapping[str, AccountState]) -> None:
        """Go on where `state` was taken, without any reservation."""
        self._open.clear()
        self._late.clear()
        self._accounts = {name: Account(each) for name, each in state.items()}

    @staticmethod
    def _of(made: Reservation, now: float) -> Account:
        """The account of a reservation that is held: it is not forgotten meanwhile."""
        account = made.account
        assert account is not None
        if int(now) != account.second:
            account.roll(now)
        return account
