"""The server's arithmetic of an account is that of gateway/limits/book.py, whatever happens and whatever the clock does."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.resp import pieces
from gateway.limits.account import Account, Limit, Shortage
from gateway.limits.book import LimitBook, Reservation
from gateway.limits.budgets import month_of
from gateway.limits.shared.commands import PREFIX
from gateway.limits.shared.shared_book import SharedBook, Verdict
from gateway.tenants.keys import Key
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.limits.shared.wires import Server, Wire, fresh_name

START = 1_798_761_500.25
"""Ten minutes before a day, a month and a year end."""

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(0, 40)),
        st.tuples(st.just("settle"), st.integers(0, 60)),
        st.tuples(st.just("time"), st.floats(0.01, 200)),
        st.tuples(st.just("set back"), st.floats(0.01, 4000)),
    ),
    min_size=5,
    max_size=60,
)


@pytest.fixture(scope="module")
def server(valkey_address: VaultAddress) -> Iterator[Server]:
    made = Server(valkey_address)
    yield made
    made.close()


def micros(now: float) -> bytes:
    return b"%d" % round(now * 1_000_000)


def reserved(shared: SharedBook, made: Reservation, now: float) -> Verdict:
    found: list[Verdict] = []
    shared.reserve(made, now, found.append)
    [verdict] = found
    return verdict


def figures(account: Account) -> tuple[object, ...]:
    state = account.state
    of_day, of_month = (state.day.period, state.day.spent), (state.month.period, state.month.spent)
    return account.running, account.held_tokens, state.requests.total, state.tokens.total, of_day, of_month


def same(ours: Shortage | None, theirs: Verdict) -> bool:
    if ours is None or not isinstance(theirs, Shortage):
        return ours is theirs is None
    close = ours.seconds == theirs.seconds or abs((ours.seconds or 0) - (theirs.seconds or 0)) < 0.002
    return close and ours._replace(seconds=None) == theirs._replace(seconds=None)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "requests_per_minute": st.integers(1, 12),
            "tokens_per_minute": st.integers(1, 120),
            "requests_in_flight_max": st.integers(1, 4),
            "tokens_in_flight_max": st.integers(1, 60),
            "tokens_per_day": st.integers(1, 200),
            "tokens_per_month": st.integers(1, 200),
        },
    ),
    STEPS,
)
@example({"tokens_per_minute": 1}, [("reserve", 0), ("reserve", 0), ("reserve", 1), ("settle", 0), ("reserve", 1)])
def test_it_decides_as_a_gateway_alone_does(server: Server, limits: dict[str, int], steps: list[tuple[str, float]]) -> None:
    key, now = limited(fresh_name(), **limits), START
    book, shared = LimitBook(1e9), SharedBook("one")
    shared.connected(Wire(server))
    open_ones: list[Reservation] = []
    for what, amount in steps:
        shared.micros = micros(now)
        if what == "reserve":
            ours, made = attempt(book, key, int(amount), now)
            theirs = reserved(shared, made, now)
            assert same(ours, theirs), (ours, theirs)
            if ours is None:
                made.shared = "there"
                open_ones.append(made)
        elif what == "settle" and open_ones:
            made = open_ones.pop(0)
            assert book.settle(made.id, int(amount), now)
            shared.settle(made, int(amount), now)
        else:
            now = now + amount if what == "time" else now - amount
            shared.micros = micros(now)
            book.account(key, now)
        shared.hold(open_ones)  # whose leases may have ended
        assert figures(book.account(key, now)) == figures(server.look(key, shared.micros))
    assert shared.is_settled


def test_an_account_that_was_deleted_begins_anew_with_what_its_requests_hold(server: Server) -> None:
    key, shared, now = limited(fresh_name(), tokens_per_day=100), SharedBook("one"), START
    shared.connected(Wire(server))
    shared.micros = micros(now)
    first, second, third, large = (Reservation(number, key, tokens, 0, 0.0) for number, tokens in enumerate((60, 30, 5, 90)))
    for made in (first, second):
        assert reserved(shared, made, now) is None
        made.shared = "there"
    assert server.run(b"".join(pieces([b"DEL", PREFIX % key.name.encode()]))) == 1
    assert reserved(shared, third, now) is None
    third.shared = "there"
    assert server.look(key, shared.micros).held_tokens == 95
    shared.settle(first, 10, now)
    assert figures(server.look(key, shared.micros))[:4] == (2, 35, 1, 10)
    found = reserved(shared, large, now)
    assert isinstance(found, Shortage)
    assert (found.limit, found.used) == (Limit.TOKENS_PER_DAY, 45)


def attempt(book: LimitBook, key: Key, asked: int, now: float) -> tuple[Shortage | None, Reservation]:
    """What the book says to a request, and the reservation that it gets, or that it would have got."""
    found = book.begin(key, now)
    if isinstance(found, Shortage):
        return found, Reservation(0, key, asked, 0, 0.0)
    short = book.hold(found.id, asked, now)
    if short is not None:
        book.withdraw(found.id, now)
    found.tokens = asked
    return short, found


@pytest.mark.parametrize("year", [1999, 2000, 2024, 2026, 2100])
def test_months_are_the_calendars(server: Server, year: int) -> None:
    key = limited(fresh_name(), tokens_per_month=5)
    for days in range(0, 366, 9):
        moment = time.mktime((year, 1, 1 + days, 12, 0, 0, 0, 0, 0))
        assert server.look(key, micros(moment)).state.month.period == month_of(moment)[0]
