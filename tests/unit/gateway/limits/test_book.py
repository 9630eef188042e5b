"""Reservations: what is let in, what a settlement changes, and what each limit says when it is reached."""

from __future__ import annotations

import pytest

from gateway.limits.account import Limit, Rate, Shortage
from gateway.limits.book import LATE_KEPT_MAX, LimitBook, Reservation
from gateway.tenants.keys import Key
from tests.unit.gateway.limits.limited_keys import limited

NOW = 1_800_000_000.5
DAY_ENDS = (NOW // 86400 + 1) * 86400


def begun(book: LimitBook, key: Key, now: float = NOW) -> Reservation:
    found = book.begin(key, now)
    assert isinstance(found, Reservation), found
    return found


def short_of(found: Reservation | Shortage | None) -> Shortage:
    assert isinstance(found, Shortage)
    return found


def test_requests_of_a_minute_are_exact_and_come_back_after_it() -> None:
    book, key = LimitBook(3600), limited(requests_per_minute=3)
    for _ in range(3):
        book.settle(begun(book, key).id, 0, NOW)
    short = short_of(book.begin(key, NOW + 10))
    assert (short.limit, short.allowed, short.used) == (Limit.REQUESTS_PER_MINUTE, 3, 3)
    assert short.seconds == pytest.approx(50.5)
    begun(book, key, NOW + 10 + short.seconds)


def test_concurrent_requests_are_counted_until_they_are_settled() -> None:
    book, key = LimitBook(3600), limited(requests_in_flight_max=2)
    first = begun(book, key)
    begun(book, key)
    assert short_of(book.begin(key, NOW)).limit is Limit.REQUESTS_IN_FLIGHT
    book.settle(first.id, 0, NOW)
    begun(book, key)


def test_requests_that_run_at_once_cannot_overshoot_together() -> None:
    book, key = LimitBook(3600), limited(tokens_per_minute=100)
    first, second = begun(book, key), begun(book, key)
    assert book.hold(first.id, 60, NOW) is None
    short = short_of(book.hold(second.id, 60, NOW))
    assert (short.limit, short.used, short.asked, short.spent) == (Limit.TOKENS_PER_MINUTE, 60, 60, False)
    book.settle(first.id, 30, NOW)
    assert book.hold(second.id, 60, NOW) is None


def test_a_settlement_counts_once() -> None:
    book, key = LimitBook(3600), limited(tokens_per_minute=100)
    made = begun(book, key)
    book.hold(made.id, 50, NOW)
    assert book.settle(made.id, 20, NOW)
    assert not book.settle(made.id, 20, NOW)
    assert not book.withdraw(made.id, NOW)
    account = book.account(key, NOW)
    assert (account.state.tokens.total, account.held_tokens, account.running) == (20, 0, 0)


def test_what_is_withdrawn_counts_for_nothing() -> None:
    book, key = LimitBook(3600), limited(requests_per_minute=1, tokens_per_minute=10)
    made = begun(book, key)
    assert short_of(book.hold(made.id, 11, NOW)).seconds is None
    assert book.withdraw(made.id, NOW)
    assert not book.settle(made.id, 5, NOW)
    begun(book, key)


def test_a_reservation_that_runs_out_is_charged_as_reserved_until_the_truth_is_known() -> None:
    book, key = LimitBook(30), limited(tokens_per_day=100, requests_in_flight_max=1)
    made = begun(book, key)
    book.hold(made.id, 80, NOW)
    later = begun(book, key, NOW + 31)
    account = book.account(key, NOW + 31)
    assert (account.state.day.spent, account.held_tokens, account.running) == (80, 0, 1)
    assert book.settle(made.id, 25, NOW + 32)
    assert not book.settle(made.id, 25, NOW + 32)
    assert (account.state.day.spent, account.state.tokens.total) == (25, 25)
    assert book.hold(later.id, 75, NOW + 32) is None


def test_what_was_used_beyond_a_late_reservation_is_charged_too() -> None:
    book, key = LimitBook(30), limited(tokens_per_day=100)
    made = begun(book, key)
    book.hold(made.id, 10, NOW)
    book.expire(NOW + 31)
    assert book.settle(made.id, 15, NOW + 32)
    assert book.account(key, NOW + 32).state.day.spent == 15


def test_budgets_are_of_their_day() -> None:
    book, key = LimitBook(1e9), limited(tokens_per_day=100)
    made = begun(book, key)
    book.hold(made.id, 60, NOW)
    other = begun(book, key)
    waits = short_of(book.hold(other.id, 60, NOW))
    assert (waits.limit, waits.spent, waits.seconds) == (Limit.TOKENS_PER_DAY, False, 1.0)
    book.settle(made.id, 60, NOW)
    spent = short_of(book.hold(other.id, 60, NOW))
    assert spent.spent
    assert spent.seconds == pytest.approx(DAY_ENDS - NOW)
    assert book.hold(other.id, 60, DAY_ENDS) is None
    book.settle(other.id, 100, DAY_ENDS)
    assert short_of(book.begin(key, DAY_ENDS)).spent


def test_the_state_goes_on_after_a_restart_and_reservations_do_not() -> None:
    book, key = LimitBook(3600), limited(tokens_per_day=100, requests_in_flight_max=2, requests_per_minute=9)
    made = begun(book, key)
    book.hold(made.id, 40, NOW)
    book.settle(made.id, 30, NOW)
    begun(book, key)
    after = LimitBook(3600)
    after.restore(book.state())
    account = after.account(key, NOW)
    assert (account.running, account.held_tokens, len(after)) == (0, 0, 0)
    assert (account.state.day.spent, account.state.requests.total) == (30, 2)


def test_late_reservations_are_bounded() -> None:
    book, key = LimitBook(1), limited()
    numbers = [begun(book, key).id for _ in range(LATE_KEPT_MAX + 5)]
    book.expire(NOW + 2)
    assert not book.settle(numbers[0], 0, NOW + 2)
    assert book.settle(numbers[-1], 0, NOW + 2)


def test_accounts_of_keys_that_are_gone_are_forgotten_once_they_are_idle() -> None:
    book, key = LimitBook(3600), limited("gone")
    made = begun(book, key)
    book.keep([])
    assert "gone" in book.state()
    book.settle(made.id, 0, NOW)
    book.keep([])
    assert book.state() == {}


def test_the_rate_that_is_shown_is_the_one_with_the_least_left() -> None:
    book = LimitBook(3600)
    key = limited(requests_per_minute=100, requests_in_flight_max=2, tokens_per_minute=1000, tokens_per_day=500)
    account = book.account(key, NOW)
    assert account.request_rate(key, NOW) == Rate(2, 2, 0.0)
    assert account.token_rate(key, NOW) == Rate(500, 500, DAY_ENDS - NOW)
    made = begun(book, key)
    book.hold(made.id, 100, NOW)
    assert account.request_rate(key, NOW) == Rate(2, 1, 1.0)
    assert account.token_rate(key, NOW) == Rate(500, 400, DAY_ENDS - NOW)
    assert account.token_rate(limited(tokens_per_minute=200), NOW) == Rate(200, 100, 1.0)
    assert account.request_rate(limited(), NOW) is None
    assert account.token_rate(limited(), NOW) is None
