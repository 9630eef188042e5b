"""Which blocks are stored before vLLM reallocates them, and when."""

import pytest

from engine.connector import ahead
from engine.connector.ahead import AHEAD_BLOCKS_MIN, CALM_BLOCKS, CALM_STEPS, FAR_BLOCKS_MAX, FAR_SHARE, Ahead, Pace
from tests.unit.engine.connector.test_stored import pool_of

MANY = 4 * FAR_BLOCKS_MAX


def choose(chooser, pool, pace):
    """As its owner does, all of whose blocks hold something."""
    blocks, most = chooser.candidates(pool, pace)
    chooser.chosen(blocks[:most], left=len(blocks) > most)
    return blocks[:most]


def calm_round(chooser, pool):
    """What so many calm steps choose together, of which only the last one does."""
    found = [choose(chooser, pool, Pace.CALM) for _ in range(CALM_STEPS)]
    assert not any(found[:-1])
    return found[-1]


@pytest.mark.parametrize(("slots", "most"), [(4 * MANY, FAR_BLOCKS_MAX), (400, 400 // FAR_SHARE)])
def test_an_idle_engine_has_all_chosen_that_is_far_ahead_within_its_share_of_the_tier(slots, most):
    pool = pool_of(*range(1, MANY))
    chooser = Ahead(slots)
    assert choose(chooser, pool, Pace.IDLE) == list(range(1, most + 1))
    assert choose(chooser, pool, Pace.IDLE) == []


def test_a_busy_step_chooses_no_more_than_its_share_of_a_small_tier():
    chooser = Ahead(40)
    chooser.moved(range(500, 600))
    assert choose(chooser, pool_of(*range(1, 300)), Pace.BUSY) == list(range(1, 11))


def test_calm_steps_choose_a_bounded_number_at_a_time_in_the_order_of_the_queue_and_then_none():
    pool = pool_of(*range(1, 300))
    chooser = Ahead(4 * MANY)
    assert calm_round(chooser, pool) == list(range(1, 1 + CALM_BLOCKS))
    assert calm_round(chooser, pool) == list(range(1 + CALM_BLOCKS, 1 + 2 * CALM_BLOCKS))
    assert calm_round(chooser, pool) == list(range(1 + 2 * CALM_BLOCKS, 300))
    assert calm_round(chooser, pool) == []


def test_the_queue_is_not_looked_at_in_calm_steps_while_all_of_it_is_stored_and_nothing_moves(monkeypatch):
    pool = pool_of(*range(1, 100))
    chooser = Ahead(4 * MANY)
    calm_round(chooser, pool)
    looks = []
    next_free = ahead._next_free
    monkeypatch.setattr(ahead, "_next_free", lambda *given: (looks.append(given), next_free(*given))[1])
    assert calm_round(chooser, pool) == []
    assert looks == []
    chooser.moved([1])
    choose(chooser, pool, Pace.BUSY)
    assert len(looks) == 1
    assert calm_round(chooser, pool_of(*range(2, 102))) == [100, 101]


def test_busy_steps_choose_only_what_the_next_such_step_may_take_and_begin_the_count_of_calm_ones_anew():
    pool = pool_of(*range(1, 1000))
    chooser = Ahead(4 * MANY)
    assert choose(chooser, pool, Pace.BUSY) == []
    chooser.moved([2000])
    assert choose(chooser, pool, Pace.BUSY) == list(range(1, 1 + AHEAD_BLOCKS_MIN))
    for _ in range(3):
        for _ in range(CALM_STEPS - 1):
            assert choose(chooser, pool, Pace.CALM) == []
        assert choose(chooser, pool, Pace.BUSY) == []


def test_a_block_is_chosen_again_only_once_it_was_reallocated():
    chooser = Ahead(4 * MANY)
    assert choose(chooser, pool_of(1, 2, 3), Pace.IDLE) == [1, 2, 3]
    assert choose(chooser, pool_of(3, 1), Pace.IDLE) == []  # a hit took them off the queue, and they came back
    chooser.moved([1, 2])
    assert choose(chooser, pool_of(3, 1, 2), Pace.IDLE) == [1, 2]
    chooser.clear()
    assert choose(chooser, pool_of(3, 1, 2), Pace.IDLE) == [3, 1, 2]


def test_blocks_that_hold_nothing_take_no_room_from_those_that_do():
    """An owner is given all that is far ahead, and stores the first of those that are on offer."""
    chooser = Ahead(4 * MANY)
    for _ in range(CALM_STEPS - 1):
        choose(chooser, pool_of(), Pace.CALM)
    blocks, most = chooser.candidates(pool_of(*range(1, 1 + 2 * CALM_BLOCKS)), Pace.CALM)
    assert (len(blocks), most) == (2 * CALM_BLOCKS, CALM_BLOCKS)
