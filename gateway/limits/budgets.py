"""Budgets of a calendar day or month, in UTC. Pure."""

from __future__ import annotations

import calendar
import time

import msgspec

_DAY_SECONDS = 86400


def day_of(now: float) -> tuple[int, float]:
    """The number of the day at `now`, Unix time, and when it ends."""
    day = int(now // _DAY_SECONDS)
    return day, end_of_day(day)


def month_of(now: float) -> tuple[int, float]:
    """The number of the month at `now`, Unix time, and when it ends."""
    moment = time.gmtime(now)
    month = moment.tm_year * 12 + moment.tm_mon - 1
    return month, end_of_month(month)


def end_of_day(day: int) -> float:
    """When the day of that number ends."""
    return (day + 1) * _DAY_SECONDS


def end_of_month(month: int) -> float:
    """When the month of that number ends."""
    year, of_year = divmod(month + 1, 12)
    return float(calendar.timegm((year, of_year + 1, 1, 0, 0, 0)))


class Budget(msgspec.Struct):
    """What was spent in one period, named by its number, until it `ends`. Call `roll` before looking at the rest."""

    period: int = 0
    ends: float = 0.0
    spent: int = 0

    def roll(self, period: int, ends: float) -> None:
        """Begin anew if a later period has begun.

        After a clock that was set back over a period's begin, it goes on with that period, which is about to begin again; if it
        was set back by more, what was spent counts for the period that it is now.
        """
        if period > self.period:
            self.period, self.ends, self.spent = period, ends, 0
        elif period < self.period - 1:
            self.period, self.ends = period, ends

    def take_back(self, period: int, amount: int) -> None:
        """An amount that was spent in that period was not used after all. Nothing happens if another one has begun."""
        if period == self.period:
            self.spent -= min(amount, self.spent)
