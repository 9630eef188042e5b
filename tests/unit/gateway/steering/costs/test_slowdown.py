"""The slowdown of a machine: quick to follow, slow to believe a single answer, forgotten soon."""

from math import exp

import pytest

from gateway.steering.costs.slowdown import MEMORY_SECONDS, SHARE, SLOWDOWN_LOG_MAX, SURPRISE_MAX, Slowdown


def test_nothing_heard_is_the_usual_slowdown() -> None:
    assert Slowdown().factor(1000.0) == 1.0


@pytest.mark.parametrize("slower", [0.6, 1.3, 1.9])
def test_it_follows_a_few_answers(slower: float) -> None:
    slowdown = Slowdown()
    for place in range(12):
        slowdown.heard(slower, place * 0.1)
    assert slowdown.factor(1.2) == pytest.approx(slower, rel=0.1)
    assert slowdown.last == pytest.approx(slower, rel=0.1)


@pytest.mark.parametrize("ratio", [1e-9, 1e9])
def test_one_answer_that_hung_moves_it_little_and_many_move_it_to_its_bound(ratio: float) -> None:
    slowdown = Slowdown()
    slowdown.heard(ratio, 0.0)
    assert max(slowdown.factor(0.0), 1 / slowdown.factor(0.0)) == pytest.approx(exp(SHARE * SURPRISE_MAX))
    for _ in range(100):
        slowdown.heard(ratio, 0.0)
    assert max(slowdown.factor(0.0), 1 / slowdown.factor(0.0)) == pytest.approx(exp(SLOWDOWN_LOG_MAX))


def test_it_fades_when_nothing_is_heard() -> None:
    slowdown = Slowdown()
    for _ in range(30):
        slowdown.heard(1.9, 5.0)
    assert 1.2 < slowdown.factor(5.0 + MEMORY_SECONDS) < 1.4
    assert slowdown.factor(5.0 + 10 * MEMORY_SECONDS) == pytest.approx(1.0, abs=1e-3)


def test_answers_out_of_order_do_not_make_it_grow() -> None:
    slowdown = Slowdown()
    slowdown.heard(1.5, 100.0)
    before = slowdown.factor(100.0)
    assert slowdown.factor(0.0) == before
    slowdown.heard(before, 0.0)
    assert slowdown.factor(100.0) == pytest.approx(before)
