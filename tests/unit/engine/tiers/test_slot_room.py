"""Slots for blocks that take one, and for blocks that take two side by side."""

import random

import pytest

from engine.tiers.slot_room import SlotRoom


def test_without_pairs_every_slot_is_given_once_and_again_when_it_is_free():
    room = SlotRoom(3, {1: 1}, whole=1)
    assert room.whole == 1
    assert [room.take(1), room.take(1), room.take(1)] == [0, 2, None]
    room.give(1)
    assert room.take(1) == 1
    assert room.beside(0) == []


def test_a_pair_lies_side_by_side_and_is_not_made_of_halves_of_two():
    room = SlotRoom(4, {}, whole=2)
    assert room.whole == 2
    assert [room.take(1), room.take(1), room.take(1)] == [0, 1, 2]
    assert room.take(2) is None
    room.give(1)
    assert room.take(2) is None  # 1 and 3 are free
    assert room.beside(1) == [0]
    room.give(0)
    assert room.take(2) == 0
    assert room.beside(3) == [2]
    assert room.beside(2) == []


def test_a_last_slot_without_another_beside_it_takes_a_coded_block():
    room = SlotRoom(3, {}, whole=2)
    assert [room.take(2), room.take(2), room.take(1)] == [0, None, 2]
    assert [room.in_whole(slot) for slot in range(3)] == [True, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_no_slot_is_ever_given_twice_and_what_is_given_back_is_all_there_in_the_end(seed):
    rng, count = random.Random(seed), 31
    room, taken = SlotRoom(count, {4: 2, 9: 1}, whole=2), {4: 2, 9: 1}
    for _ in range(2000):
        size = rng.choice((1, 1, 2))
        slot = room.take(size) if rng.random() < 0.55 else None
        if slot is not None:
            assert size == 1 or slot % 2 == 0
            taken[slot] = size
            used = [each + more for each, many in taken.items() for more in range(many)]
            assert len(set(used)) == len(used)
            assert max(used) < count
        elif taken:
            gone = rng.choice(list(taken))
            del taken[gone]
            room.give(gone)
    for slot in taken:
        room.give(slot)
    assert {room.take(2) for _ in range(15)} == set(range(0, 30, 2))
    assert room.take(1) == 30
