"""What is sent to the server for an account, and what its answer means. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import NamedTuple

from engine.frame_tiers.vault.resp import Reply, VaultError, Word, pieces
from gateway.limits.account import Account, AccountState
from gateway.limits.budgets import Budget, day_of, end_of_day, end_of_month, month_of
from gateway.limits.windows import MinuteWindow
from gateway.tenants.keys import Key

SCRIPT = resources.files(__package__).joinpath("account.lua").read_bytes()
LEASE_SECONDS = 30.0
"""What a gateway holds is free again after this, unless it says that it is still there."""
PREFIX = b"peerkv:limits:1:{%b}"
_SHA = hashlib.sha1(SCRIPT, usedforsecurity=False).hexdigest().encode()
_LEASE = b"%d" % (LEASE_SECONDS * 1000)
_OK, _SHORT, _REPLACED = 0, 1, 2
_OF_THE_ACCOUNT = ("ERR", "WRONGTYPE")
"""How errors begin that say nothing about the server."""
FIGURES = 12
"""So many numbers has an answer, before those of a minute's seconds."""
_DIGITS_MAX = 24
_NOW_MAX = 1e11
"""In the year 5138: no calendar has an end."""

Pairs = Iterable[tuple[bytes, bool]]
"""Ids of requests, each with whether it is known to be counted."""


class AnswerRefused(ValueError):
    """It is no answer of our script: the server is of no use."""


class AccountUnusable(ValueError):
    """Our script, or we, can do nothing with what the server holds for this account. It would be the same again."""


class Told(NamedTuple):
    """What the server said of an account, at its time `now`, Unix time. `short`: too little is left of it for the request.

    If it is short the minute is told by the second, else as if all had been used in the newest one.
    """

    account: Account
    now: float
    short: bool


class Sender(NamedTuple):
    """Who speaks: `epoch` counts its connections. `micros` stands for the server's clock in tests."""

    gateway: bytes
    epoch: int
    micros: bytes = b""

    def reserve(self, key: Key, id: bytes, tokens: int) -> bytes:
        """Count a request of the key and hold its tokens, if there is room for both."""
        limits = (
            *(key.requests_in_flight_max, key.requests_per_minute, key.tokens_in_flight_max),
            *(key.tokens_per_minute, key.tokens_per_day, key.tokens_per_month),
        )
        return self._command(key.name, b"reserve", 0, tokens, id, *(b"%d" % (-1 if most is None else most) for most in limits))

    def settle(self, name: str, seq: int, tokens: int, requests: int, pairs: Pairs) -> bytes:
        """Charge tokens, count so many requests that are not among the `pairs`, and end what is held for these."""
        return self._command(name, b"settle", seq, tokens, b"%d" % requests, *_flat(pairs))

    def hold(self, name: str, pairs: Pairs) -> bytes:
        """Say that these requests are under way."""
        return self._command(name, b"hold", 0, 0, *_flat(pairs))

    def _command(self, name: str, what: bytes, seq: int, tokens: int, *rest: bytes) -> bytes:
        account = PREFIX % name.encode()
        words: list[Word] = [b"EVALSHA", _SHA, b"3", account, account + b":open", account + b":gateways"]
        words += (what, self.gateway, b"%d" % self.epoch, b"%d" % seq, b"%d" % tokens, _LEASE, self.micros, *rest)
        return b"".join(pieces(words))


LOAD: Sequence[Word] = (b"SCRIPT", b"LOAD", SCRIPT)


def understood(reply: Reply) -> Told | None:
    """What an answer tells; None if a newer connection of ours had spoken before. Raises AnswerRefused, AccountUnusable."""
    if isinstance(reply, VaultError):
        raise (AccountUnusable if str(reply).startswith(_OF_THE_ACCOUNT) else AnswerRefused)(str(reply))
    numbers, *minutes = [part.split() for part in reply.split(b"|")] if isinstance(reply, bytes) else [[]]
    if not all(_is_number(word) for words in (numbers, *minutes) for word in words) or len(numbers) != FIGURES:
        raise _refused(reply)
    verdict = int(numbers[0])
    if verdict == _REPLACED and not minutes:
        return None
    if verdict not in (_OK, _SHORT) or len(minutes) != 2 * verdict or any(len(words) % 2 for words in minutes):
        raise _refused(reply)
    by_second = [dict(zip(map(int, words[::2]), map(int, words[1::2]), strict=True)) for words in minutes]
    return _told([*map(int, numbers)], by_second)


def _is_number(word: bytes) -> bool:
    return word.removeprefix(b"-").isdigit() and len(word) <= _DIGITS_MAX


def _refused(reply: Reply) -> AnswerRefused:
    return AnswerRefused(f"the server's answer is none of our script: {reply!r:.100}")


def _told(numbers: Sequence[int], minutes: Sequence[dict[int, int]]) -> Told:
    """Raises AccountUnusable for figures that no account comes to."""
    _, milli, running, held, requests, requests_newest, tokens, tokens_newest, day, of_day, month, of_month = numbers
    now = milli / 1000
    if (
        min(numbers) < 0
        or now > _NOW_MAX
        or max(requests_newest, tokens_newest) > now
        or not {day - day_of(now)[0], month - month_of(now)[0]} <= {0, 1}  # 1 after a clock that was set back: see Budget.roll
        or (minutes and [sum(each.values()) for each in minutes] != [requests, tokens])
        or any([*each] != sorted(each) for each in minutes)
    ):
        raise AccountUnusable(f"its figures cannot be: {numbers}")
    by_second = minutes or ({requests_newest: requests} if requests else {}, {tokens_newest: tokens} if tokens else {})
    account = Account(
        AccountState(
            MinuteWindow(by_second[0], requests, requests_newest),
            MinuteWindow(by_second[1], tokens, tokens_newest),
            Budget(day, end_of_day(day), of_day),
            Budget(month, end_of_month(month), of_month),
        )
    )
    account.running, account.held_tokens = running, held
    return Told(account, now, bool(minutes))


def _flat(pairs: Pairs) -> list[bytes]:
    return [word for id, counted in pairs for word in (id, b"1" if counted else b"0")]
