"""When requests are overdue by so much that their replica is suspect."""

from dataclasses import dataclass

from gateway.steering.overdue import OVERDUE_FACTOR, overdue_seconds


@dataclass
class Waiting:
    decided_at: float
    expected_seconds: float


def test_who_waits_for_long_where_no_step_is_made_makes_the_replica_suspect() -> None:
    assert overdue_seconds([Waiting(100.0, 0.1)], 99.0, 104.9, 5.0) == 0.0
    assert overdue_seconds([Waiting(100.0, 0.1), Waiting(104.0, 0.1)], 99.0, 105.5, 5.0) == 5.5


def test_while_steps_are_made_a_long_queue_is_no_fault() -> None:
    assert overdue_seconds([Waiting(100.0, 0.1)], 199.0, 200.0, 5.0) == 0.0


def test_a_prompt_that_takes_long_may_take_long() -> None:
    long = [Waiting(100.0, 4.0)]
    assert overdue_seconds(long, 100.0, 100.0 + 4.0 * OVERDUE_FACTOR, 5.0) == 0.0
    assert overdue_seconds(long, 100.0, 101.0 + 4.0 * OVERDUE_FACTOR, 5.0) > 0


def test_nobody_waits_nothing_is_overdue() -> None:
    assert overdue_seconds([], 0.0, 1e9, 5.0) == 0.0
