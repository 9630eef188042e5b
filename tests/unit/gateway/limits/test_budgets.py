"""Days and months in UTC."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from gateway.limits.account import Account, Limit
from gateway.limits.budgets import Budget, day_of, month_of
from gateway.tenants.keys import KeyLimits


def unix(*parts: int) -> float:
    return datetime(*parts, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("moment", "end"),
    [
        ((2026, 1, 1), (2026, 2, 1)),
        ((2026, 2, 28, 23, 59, 59), (2026, 3, 1)),
        ((2026, 11, 29), (2026, 12, 1)),
        ((2026, 12, 31, 23), (2027, 1, 1)),
    ],
)
def test_a_month_ends_when_the_next_begins(moment: tuple[int, ...], end: tuple[int, ...]) -> None:
    month, ends = month_of(unix(*moment))
    assert ends == unix(*end)
    assert month_of(ends - 1)[0] == month
    assert month_of(ends)[0] == month + 1


def test_a_day_ends_at_midnight() -> None:
    assert day_of(unix(2026, 11, 29, 23, 59))[1] == unix(2026, 11, 30)
    assert day_of(unix(2026, 11, 30))[0] == day_of(unix(2026, 11, 29))[0] + 1


def test_a_new_period_begins_with_nothing_spent_and_takes_nothing_back_of_the_old_one() -> None:
    budget = Budget()
    budget.roll(1, 10.0)
    budget.spent = 7
    budget.roll(1, 10.0)
    assert budget.spent == 7
    budget.roll(2, 20.0)
    budget.take_back(1, 5)
    assert budget.spent == 0


def test_a_clock_that_is_set_back_over_midnight_gives_nobody_a_new_budget() -> None:
    account, limits = Account(), KeyLimits(tokens_per_day=100, tokens_per_month=1000)
    after = unix(2026, 12, 1, 0, 5)
    account.roll(after)
    account.charge(70, after)
    for now in (unix(2026, 11, 30, 23, 55), unix(2026, 12, 1, 0, 0, 1), after + 60):
        account.roll(now)
        assert (account.state.day.spent, account.state.month.spent) == (70, 70)
        short = account.token_shortage(limits, 40, now)
        assert short is not None
        assert short.limit is Limit.TOKENS_PER_DAY
    account.roll(unix(2026, 12, 2))
    assert (account.state.day.spent, account.state.month.spent) == (0, 70)


def test_a_clock_that_was_years_ahead_ends_no_budget_for_years() -> None:
    account = Account()
    account.roll(unix(2036, 1, 1))
    account.charge(70, unix(2036, 1, 1))
    account.roll(unix(2026, 11, 30))
    assert (account.state.day.spent, account.state.day.ends) == (70, unix(2026, 12, 1))
    account.roll(unix(2026, 12, 1))
    assert (account.state.day.spent, account.state.month.spent) == (0, 0)
