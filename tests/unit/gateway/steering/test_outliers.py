"""Outlier ejection: who fails gets nothing for a while, then one request, and what becomes of that decides."""

import pytest

from gateway.steering.outliers import NEVER, Outliers, OutlierState

FLEET = ["a", "b"]


@pytest.fixture
def outliers() -> Outliers:
    return Outliers(3, 1.0, 8.0)


def fail(outliers: Outliers, times: int, now: float = 0.0, status: int = 500) -> None:
    for _ in range(times):
        outliers.sent("a")
        outliers.ended("a", status, now)


def test_while_all_is_well_everybody_takes(outliers: Outliers) -> None:
    outliers.ended("a", 200, 0.0)
    fail(outliers, 2)
    outliers.ended("a", 404, 0.0)  # a client's error is an answer
    fail(outliers, 2)
    assert outliers.takers(FLEET, 0.0) is FLEET
    assert outliers.seen("a", 0.0) == NEVER


@pytest.mark.parametrize("status", [429, 500, 503, 0])
def test_a_replica_that_fails_in_a_row_is_ejected(outliers: Outliers, status: int) -> None:
    fail(outliers, 3, status=status)
    assert outliers.takers(FLEET, 0.9) == ["b"]
    seen = outliers.seen("a", 0.25)
    assert (seen.standing, seen.seconds_left, seen.ejections) == (OutlierState.EJECTED, 0.75, 1)
    assert (f"answered {status}" if status else "broke off") in seen.why


def test_a_replica_that_fails_every_other_time_is_ejected_too(outliers: Outliers) -> None:
    for _ in range(8):
        assert outliers.takers(FLEET, 0.0) is FLEET
        outliers.ended("a", 200, 0.0)
        outliers.ended("a", 500, 0.0)
    assert outliers.takers(FLEET, 0.0) == ["b"]


def test_one_request_at_a_time_tries_it_again(outliers: Outliers) -> None:
    fail(outliers, 3)
    assert outliers.takers(FLEET, 1.0) == FLEET
    assert outliers.seen("a", 1.0).standing is OutlierState.HALF_OPEN
    outliers.sent("a")
    assert outliers.takers(FLEET, 1.0) == ["b"]
    outliers.ended("a", 200, 1.5)
    assert outliers.takers(FLEET, 1.5) is FLEET
    assert outliers.seen("a", 1.5).ejections == 1


def test_a_failed_try_doubles_the_time_up_to_its_bound(outliers: Outliers) -> None:
    fail(outliers, 3)
    now, waits = 0.0, []
    for _ in range(5):
        waits.append(outliers.seen("a", now).seconds_left)
        now += waits[-1]
        fail(outliers, 1, now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_after_a_good_time_the_first_ejection_is_short_again(outliers: Outliers) -> None:
    fail(outliers, 3)
    fail(outliers, 1, 1.0)
    outliers.sent("a")
    outliers.ended("a", 200, 3.0)
    fail(outliers, 3, 100.0)
    assert outliers.seen("a", 100.0).seconds_left == 1.0


def test_what_was_sent_before_the_ejection_neither_ends_nor_lengthens_it(outliers: Outliers) -> None:
    fail(outliers, 3)
    outliers.ended("a", 500, 0.5)
    outliers.ended("a", 200, 0.5)
    assert outliers.seen("a", 0.5).seconds_left == 0.5
    assert outliers.takers(FLEET, 0.5) == ["b"]


def test_a_client_that_leaves_says_nothing_and_lets_the_next_one_try(outliers: Outliers) -> None:
    fail(outliers, 3)
    outliers.sent("a")
    outliers.ended("a", 499, 2.0)
    assert outliers.seen("a", 2.0).standing is OutlierState.HALF_OPEN
    assert outliers.takers(FLEET, 2.0) == FLEET


def test_a_stream_that_begins_is_success_enough(outliers: Outliers) -> None:
    fail(outliers, 3)
    outliers.sent("a")
    outliers.began("a", 1.0)
    assert outliers.takers(FLEET, 1.0) is FLEET


def test_if_nobody_else_is_left_the_ejected_take_all(outliers: Outliers) -> None:
    fail(outliers, 3)
    assert outliers.takers(["a"], 0.5) == ["a"]
    outliers.suspect({"b": "its engine made no step for 9 s"})
    assert outliers.takers(FLEET, 0.5) == FLEET


def test_a_suspect_gets_nothing_until_it_is_cleared(outliers: Outliers) -> None:
    outliers.suspect({"b": "its engine made no step for 9 s"})
    assert outliers.takers(FLEET, 0.0) == ["a"]
    assert (outliers.seen("b", 0.0).standing, outliers.seen("b", 0.0).why) == (
        OutlierState.SUSPECT,
        "its engine made no step for 9 s",
    )
    outliers.suspect({})
    assert outliers.takers(FLEET, 0.0) is FLEET


def test_a_restarted_replica_begins_anew(outliers: Outliers) -> None:
    fail(outliers, 3)
    outliers.keep(["b"])
    assert outliers.takers(FLEET, 0.0) is FLEET


def test_ejection_can_be_turned_off() -> None:
    outliers = Outliers(0, 1.0, 8.0)
    fail(outliers, 100)
    assert outliers.takers(FLEET, 0.0) is FLEET
