"""Budgets of a calendar day or month, in UTC. Pure."""

from __future__ import annotations

import calendar
import time

import msgspec

_DAY_SECONDS = 86400


def day_of(now: float) -> tuple[int, float]:
    """The number of the day at `now`, Unix time, and when it ends."""
    day = int(now // _DAY_SECONDS)
    return day, (day + 1) * _DAY_SECONDS


def month_of(now: float) -> tuple[int, float]:
    """The number of the month at `now`, Unix time, and when it ends."""
    moment = time.gmtime(now)
    month = moment.tm_year * 12 + moment.tm_mon  # which is the next month's, counted from 0
    return month - 1, float(calendar.timegm((month // 12, month % 12 + 1, 1, 0, 0, 0)))


class Budget(msgspec.Struct):
    """What was spent in one period, named by its number, until it `ends`. Call `roll` before looking at the rest."""

    period: int = 0
    ends: float = 0.0
    spent: int = 0

    def roll(self, period: int, ends: float) -> None:
        """Begin anew if another period has begun."""
        if period != self.period:
            self.period, self.ends, self.spent = period, ends, 0

    def take_back(self, period: int, amount: int) -> None:
        """An amount that was spent in that period was not used after all. Nothing happens if another one has begun."""
        if period == self.period:
            self.spent -= min(amount, self.spent)
