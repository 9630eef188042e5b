"""The last minute: nothing leaves it early, whatever the clock does."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.limits.windows import WINDOW_SECONDS, MinuteWindow

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
STEPS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 9)), max_size=40)


@PATIENT
@given(STEPS)
def test_what_was_added_in_any_sixty_seconds_is_counted_at_their_end(steps: list[tuple[float, int]]) -> None:
    window, now, added = MinuteWindow(), 1000.25, []
    for seconds, amount in steps:
        now += seconds
        window.roll(now)
        window.add(amount, now)
        added.append((now, amount))
        assert window.total >= sum(each for at, each in added if at > now - WINDOW_SECONDS)
        assert window.total == sum(window.slots.values())
        assert window.total <= sum(each for at, each in added if at > now - WINDOW_SECONDS - 1)
        assert len(window.slots) <= WINDOW_SECONDS + 1


@PATIENT
@given(STEPS, st.integers(1, 50))
def test_after_the_time_it_says_so_much_has_left_and_not_before(steps: list[tuple[float, int]], needed: int) -> None:
    window, now = MinuteWindow(), 1000.0
    for seconds, amount in steps:
        now += seconds
        window.roll(now)
        window.add(amount, now)
    needed, before = min(needed, window.total), window.total
    seconds = window.frees(needed, now)
    window.roll(now + seconds - 0.01)
    assert not needed or before - window.total < needed
    window.roll(now + seconds)
    assert before - window.total >= needed


@PATIENT
@given(STEPS)
def test_it_is_empty_after_the_time_it_says(steps: list[tuple[float, int]]) -> None:
    window, now = MinuteWindow(), 1000.0
    for seconds, amount in steps:
        now += seconds
        window.roll(now)
        window.add(amount, now)
    seconds = window.empties(now)
    assert seconds <= WINDOW_SECONDS + 1
    window.roll(now + seconds)
    assert window.total == 0


def test_what_came_to_nothing_is_not_waited_for() -> None:
    window = MinuteWindow()
    window.add(0, 1000.0)
    assert window.frees(1, 1000.0) == 0.0
    taken = window.add(5, 1001.0)
    window.take_back(taken, 5)
    window.add(3, 1002.0)
    assert window.frees(3, 1002.0) == WINDOW_SECONDS + 1
    assert window.frees(9, 1010.0) == WINDOW_SECONDS - 7


def test_a_clock_that_is_set_back_keeps_nothing_longer_than_a_minute() -> None:
    window = MinuteWindow()
    window.roll(10_000)
    window.add(5, 10_000)
    window.roll(4_000)
    assert window.total == 5
    window.roll(4_000 + WINDOW_SECONDS + 1)
    assert window.total == 0


def test_no_more_is_taken_back_than_there_was() -> None:
    window = MinuteWindow()
    window.roll(10)
    second = window.add(5, 10)
    window.take_back(second, 9)
    window.take_back(second - 1, 9)
    assert window.total == 0
