"""Blocks of host memory that became too old give way, at little cost in each step, and what is held does so later."""

import pytest

from engine.tiers.ages import EXPIRED_MAX, Ages
from engine.tiers.host_memory import HostMemory
from engine.tiers.stores import NO_STORES
from tests.unit.engine.keeper import Keeper
from tests.unit.engine.tiers.test_host_memory import KEYS, held, nowhere, store, table_of, take
from transport.hint import PinWish
from transport.table.reader import TableReader

SECOND = 10**9
TTL = 10


@pytest.fixture
def made(tmp_path):
    """Makes a tier of four slots, or anew what goes on with it, and a reader of its table."""
    keeper, readers = Keeper(tmp_path), []

    def make(ttl_seconds=TTL, slots=4):
        table = table_of(keeper, tmp_path, slots)
        readers.append(TableReader(table.path))
        memory = HostMemory(table, ranks=1, elsewhere=nowhere, pin_share_max=0.5, ttl_seconds=ttl_seconds)
        memory.expire(0)
        return memory, readers[-1]

    yield make
    for reader in readers:
        reader.close()


def test_a_block_is_withdrawn_when_it_was_there_for_so_long_and_its_slot_is_free(made):
    memory, reader = made()
    store(memory, 0, 1)
    memory.expire(6 * SECOND)
    store(memory, 2)
    take(memory, 0)  # that it would be stored again makes it no younger
    assert memory.take_stores() is NO_STORES
    _, slots, states = reader.look_up(KEYS[0:1])
    memory.expire(TTL * SECOND - 1)
    assert held(reader) == [0, 1, 2]
    memory.expire(TTL * SECOND)
    assert held(reader) == [2]
    assert not reader.unchanged(slots, states).any()
    assert reader.counters()["evictions"] == 2
    store(memory, 3, 4, 5)
    assert held(reader) == [2, 3, 4, 5]  # none of them had to give way
    memory.expire(16 * SECOND)
    assert held(reader) == [3, 4, 5]


def test_without_end_nothing_becomes_too_old(made):
    memory, reader = made(0.0)
    store(memory, 0, 1)
    memory.expire(10**18)
    assert held(reader) == [0, 1]


def test_what_is_read_or_pinned_stays_until_that_ends(made):
    memory, reader = made()
    memory.pin(PinWish(7, 25.0), [10], KEYS[:1], [0], [0], 0)
    memory.copied({each.slot: 1 for each in memory.take_stores().begun})
    store(memory, 1)
    slots = reader.look_up(KEYS[1:2])[1].tolist()
    memory.restored(slots)
    memory.expire(12 * SECOND)
    assert held(reader) == [0, 1]
    memory.read(slots)
    memory.expire(13 * SECOND)
    assert held(reader) == [0]
    memory.expire(26 * SECOND)
    assert held(reader) == []


def test_what_gave_way_and_was_stored_again_is_young_and_a_flush_forgets_all_ages(made):
    memory, reader = made()
    store(memory, 0, 1, 2, 3)
    memory.expire(8 * SECOND)
    store(memory, 4)  # in the place of the first
    memory.expire(TTL * SECOND)
    assert held(reader) == [4]
    memory.clear()
    store(memory, 5)
    memory.expire(19 * SECOND)
    assert held(reader) == [5]


def test_after_a_restart_ages_begin_anew(made):
    memory, reader = made()
    store(memory, 0)
    memory.expire(8 * SECOND)
    again, _ = made()
    again.expire(9 * SECOND)
    assert held(reader) == [0]
    again.expire(TTL * SECOND)
    assert held(reader) == []


def test_a_step_tries_a_bounded_number_and_one_in_which_nothing_is_due_looks_at_one_block(made):
    ages, tried = Ages(TTL), []
    ages.expire(0, tried.append)
    for slot in range(3 * EXPIRED_MAX):
        ages.filled(slot)
    assert ages.expire(TTL - 1, lambda slot: tried.append(slot) or True) == []
    assert tried == []
    for count in (1, 2, 3):
        assert len(ages.expire(TTL, lambda slot: tried.append(slot) or True)) == EXPIRED_MAX
        assert len(tried) == count * EXPIRED_MAX
    assert ages.expire(TTL, lambda slot: True) == []
    assert tried == list(range(3 * EXPIRED_MAX))


def test_held_slots_are_tried_in_turn_and_no_more_of_them_at_once(made):
    ages, tried = Ages(TTL), []
    ages.expire(0, tried.append)
    for slot in range(2 * EXPIRED_MAX):
        ages.filled(slot)
    for _ in range(4):
        ages.expire(TTL, tried.append)  # which returns None: held
    assert len(tried) <= 4 * 2 * EXPIRED_MAX
    assert set(tried) == set(range(2 * EXPIRED_MAX))
    ages.emptied(5)
    gone = [slot for _ in range(2) for slot in ages.expire(TTL, lambda slot: True)]
    assert sorted([*gone, 5]) == list(range(2 * EXPIRED_MAX))
