"""Whatever the order of reservations, settlements, crashes, retries and time-outs: no limit is exceeded, and sums are true."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from gateway.limits.account import Account, AccountState
from gateway.limits.book import LimitBook, Reservation
from gateway.limits.limiter import WRITE_SECONDS
from gateway.limits.windows import WINDOW_SECONDS
from tests.unit.gateway.limits.limited_keys import limited

RESERVATION_SECONDS = 40.0
MIDNIGHT = 20_000 * 86400.0
Made = tuple[LimitBook, int, int]
"""Whose reservation, its id, and how many tokens it holds."""


class Written(NamedTuple):
    """What a write at this moment puts into the file: the state, what was spent, and when each request began that counts."""

    at: float
    content: bytes
    spent: int
    begun: list[float]


class Interleaving(RuleBasedStateMachine):
    """Requests of one key. `open` are those that nobody has settled yet, with when they run out; `true_sum` is what was used
    on one day by all that were, and by those that had run out and a crash kept from being settled."""

    reservations = Bundle("reservations")

    @initialize(requests=st.integers(1, 12), tokens=st.integers(1, 80), running=st.integers(1, 4), day=st.integers(1, 80))
    def begin(self, requests: int, tokens: int, running: int, day: int) -> None:
        self.key = limited(
            requests_per_minute=requests, tokens_per_minute=tokens, requests_in_flight_max=running, tokens_per_day=day
        )
        self.now = MIDNIGHT + 0.5
        self.book = LimitBook(RESERVATION_SECONDS)
        self.open: dict[int, tuple[float, int]] = {}
        self.begun: list[float] = []
        self.true_sum = 0
        self.moments = [Written(self.now - WRITE_SECONDS, b"{}", 0, [])]
        self.note()

    def note(self) -> None:
        """Remember what would be written now, and what a write WRITE_SECONDS ago would have."""
        account = self.account()
        content = msgspec.json.encode(self.book.state())
        self.moments.append(Written(self.now, content, account.state.day.spent, list(self.begun)))
        oldest = max((at for at, *_ in self.moments if at <= self.now - WRITE_SECONDS), default=0.0)
        self.moments = [moment for moment in self.moments if moment.at >= oldest]

    def account(self) -> Account:
        self.book.expire(self.now)
        return self.book.account(self.key, self.now)

    @rule(target=reservations, asked=st.integers(0, 30))
    def reserve(self, asked: int) -> Made | None:
        found = self.book.begin(self.key, self.now)
        if not isinstance(found, Reservation):
            return None
        if self.book.hold(found.id, asked, self.now) is not None:
            assert self.book.withdraw(found.id, self.now)
            return None
        self.begun.append(self.now)
        self.open[found.id] = (self.now + RESERVATION_SECONDS, asked)
        return self.book, found.id, asked

    @rule(which=reservations, share=st.floats(0, 1), times=st.integers(1, 3))
    def settle(self, which: Made | None, share: float, times: int) -> None:
        """In time or late, and again: by a retry that does not know what became of the attempt before."""
        if which is None or which[0] is not self.book:
            return  # a crash took whoever could settle it
        tokens = int(which[2] * share)
        results = [self.book.settle(which[1], tokens, self.now) for _ in range(times)]
        first = self.open.pop(which[1], None) is not None
        assert results == [first] + [False] * (times - 1)
        self.true_sum += first * tokens

    @rule(seconds=st.floats(0.1, 70))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def crash(self) -> None:
        """All is lost but what was written. Nobody will say what those used that had run out: they stay as reserved."""
        written = msgspec.json.encode(self.account() and self.book.state())
        self.true_sum += sum(tokens for ends, tokens in self.open.values() if ends <= self.now)
        self.open.clear()
        self.book = LimitBook(RESERVATION_SECONDS)
        self.book.restore(msgspec.json.decode(written, type=dict[str, AccountState]))

    @rule(seconds=st.floats(0.01, 0.6))
    def a_moment_passes(self, seconds: float) -> None:
        """Less than is between two writes."""
        self.now += seconds

    @rule(age=st.floats(0, WRITE_SECONDS))
    def crash_between_two_writes(self, age: float) -> None:
        """What was spent, and what was given back, in the last WRITE_SECONDS is forgotten, and nothing else."""
        spent = self.account().state.day.spent
        self.note()
        found = [moment for moment in self.moments if moment.at <= self.now - age][-1]
        steps = [after.spent - before.spent for before, after in pairwise(self.moments) if after.at > self.now - WRITE_SECONDS]
        begun_lately = sum(at > self.now - WRITE_SECONDS for at in self.begun)
        counted = sum(at > self.now - WINDOW_SECONDS for at in self.begun)
        self.open.clear()
        self.book = LimitBook(RESERVATION_SECONDS)
        self.book.restore(msgspec.json.decode(found.content, type=dict[str, AccountState]))
        account = self.account()
        forgotten = spent - account.state.day.spent
        assert sum(step for step in steps if step < 0) <= forgotten <= sum(step for step in steps if step > 0)
        assert account.state.requests.total >= counted - begun_lately
        assert (account.running, account.held_tokens) == (0, 0)
        self.true_sum, self.begun = found.spent, list(found.begun)
        self.moments = [found._replace(at=self.now - WRITE_SECONDS)]
        self.note()

    @invariant()
    def no_limit_is_exceeded_and_nothing_leaks(self) -> None:
        if not hasattr(self, "book"):
            return
        account, key = self.account(), self.key
        running = [tokens for ends, tokens in self.open.values() if ends > self.now]
        timed_out = sum(tokens for ends, tokens in self.open.values() if ends <= self.now)
        assert account.running == len(self.book) == len(running) <= key.requests_in_flight_max
        assert account.held_tokens == sum(running)
        assert account.state.day.spent == self.true_sum + timed_out
        assert account.state.day.spent + account.held_tokens <= key.tokens_per_day
        assert account.state.tokens.total + account.held_tokens <= key.tokens_per_minute
        lately = sum(at > self.now - WINDOW_SECONDS for at in self.begun)
        assert lately <= account.state.requests.total <= key.requests_per_minute
        self.note()

    def teardown(self) -> None:
        """Once everybody has settled, late or not, what was charged is what was used."""
        if not hasattr(self, "book"):
            return
        for number, (_, tokens) in self.open.items():
            assert self.book.settle(number, tokens // 2, self.now)
            self.true_sum += tokens // 2
        account = self.account()
        assert account.state.day.spent == self.true_sum
        assert (account.running, account.held_tokens, len(self.book)) == (0, 0, 0)


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
