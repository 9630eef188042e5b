"""Pinned prefixes in host memory: they are stored when they are pinned, and stay until they are not any more."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.tiers.host_memory import HostMemory
from engine.tiers.tier_pins import PINS_MAX, TierPins
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import description
from transport.hint import PinWish
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.quality import marked, tenant_mark
from transport.table.reader import TableReader

SLOTS = 16
SECOND = 10**9
KEYS = chain_keys(root_key(b"f" * 16), range(4 * 4096), 4)
FLOOD = range(1000, 1200)
ANNE, BERT = marked(tenant_mark("anne")), marked(tenant_mark("bert"))


class Tier:
    """A tier of SLOTS slots, half of which pins may hold; `elsewhere` are the places that another tier has."""

    def __init__(self, path: Path):
        self.keeper = Keeper(path)
        draft = Path(self.keeper.keep("replica-0", 4096).draft)
        self.table = KeptTable(path, description("replica-0.host-memory"), 4, SLOTS, draft)
        self.elsewhere = np.zeros(4096, np.bool_)
        self.memory = HostMemory(self.table, ranks=1, elsewhere=self.held_elsewhere, tenant_share_max=0.5, pin_share_max=0.5)
        self.reader = TableReader(self.table.path)

    def held_elsewhere(self, keys):
        places = {bytes(key): place for place, key in enumerate(KEYS)}
        return np.array([self.elsewhere[places[bytes(key)]] for key in keys], np.bool_)

    def copied(self):
        self.memory.copied({each.slot: 1 for each in self.memory.take_stores().begun})

    def store(self, *places, quality=0):
        for place in places:
            self.memory.take([place], KEYS[place : place + 1], [0], [quality])
            self.copied()

    def pin(self, number, *places, seconds=10.0, quality=0, now_ns=0):
        count = len(places)
        self.memory.pin(PinWish(number, seconds), places, KEYS[list(places)], [0] * count, [quality] * count, now_ns)
        self.copied()

    def held(self, places):
        return [place for place in places if self.reader.look_up(KEYS[place : place + 1])[0].any()]


@pytest.fixture
def tier(tmp_path):
    found = Tier(tmp_path)
    with closing(found.reader):
        yield found


def test_what_is_pinned_is_stored_at_once_and_outlives_a_flood_until_it_is_unpinned(tier):
    tier.pin(7, 0, 1, 2)
    assert tier.held(range(4)) == [0, 1, 2]
    tier.store(*FLOOD)
    assert tier.held(range(4)) == [0, 1, 2]
    tier.memory.unpin([7, 8])
    tier.store(*FLOOD)
    assert tier.held(range(4)) == []


def test_what_is_stored_already_is_held_too_and_not_copied_again(tier):
    tier.store(0, 1)
    tier.memory.pin(PinWish(7, 10.0), [0, 1, 2], KEYS[:3], [0] * 3, [0] * 3, 0)
    assert [each.key for each in tier.memory.take_stores().begun] == [KEYS[2].tobytes()]
    tier.store(*FLOOD)
    assert tier.held(range(3)) == [0, 1]


def test_a_pin_ends_when_its_time_is_up_and_not_before(tier):
    tier.pin(7, 0, 1, seconds=10.0, now_ns=5 * SECOND)
    tier.memory.expire(15 * SECOND - 1)
    tier.store(*FLOOD)
    assert tier.held(range(2)) == [0, 1]
    tier.memory.expire(15 * SECOND)
    tier.store(*FLOOD)
    assert tier.held(range(2)) == []


def test_a_block_of_two_pins_stays_until_both_have_ended_and_one_that_is_read_until_that_too(tier):
    tier.pin(7, 0, 1)
    tier.pin(8, 0, 2)
    tier.memory.unpin([7])
    tier.store(*FLOOD)
    assert tier.held(range(3)) == [0, 2]
    slot = tier.reader.look_up(KEYS[:1])[1].tolist()
    tier.memory.restored(slot)
    tier.memory.unpin([8])
    tier.store(*FLOOD)
    assert tier.held(range(3)) == [0]
    tier.memory.read(slot)
    tier.store(*FLOOD)
    assert tier.held(range(3)) == []


def test_a_pin_that_is_renewed_with_another_length_holds_what_it_names_last(tier):
    tier.pin(7, 0, 1, 2)
    tier.pin(7, 0, 1, 3)
    tier.store(*FLOOD)
    assert tier.held(range(4)) == [0, 1, 3]


def test_what_another_replica_has_in_its_host_memory_is_stored_here_all_the_same(tier):
    """It may give way there."""
    tier.elsewhere[:3] = True
    tier.store(0)
    assert tier.held(range(3)) == []
    tier.pin(7, 0, 1)
    assert tier.held(range(3)) == [0, 1]


def test_pins_have_their_share_of_the_room_at_most(tier):
    tier.pin(7, *range(6))
    tier.pin(8, *range(10, 16))  # more than half of the slots with the former
    tier.store(*FLOOD)
    assert (tier.held(range(6)), tier.held(range(10, 16))) == (list(range(6)), [])


def test_a_tenant_whose_pins_have_its_share_gets_no_other_ones_room(tier):
    tier.store(*range(100, 108), quality=BERT)
    tier.pin(7, *range(8), quality=ANNE)
    tier.store(*FLOOD, quality=ANNE)
    assert (tier.held(range(8)), tier.held(range(100, 108))) == (list(range(8)), list(range(100, 108)))
    assert tier.reader.counters()["tier_dropped_blocks"] == len(FLOOD)


def test_a_flush_ends_pins(tier):
    tier.pin(7, 0, 1)
    tier.memory.clear()
    assert tier.held(range(2)) == []
    tier.store(0, 1, *FLOOD)
    tier.memory.unpin([7])
    assert tier.held(range(2)) == []


def test_the_number_of_pins_is_bounded():
    pins = TierPins(2)
    for number in range(PINS_MAX):
        assert pins.take(PinWish(number, 1.0), [b"a"], 0) is not None
    assert pins.take(PinWish(PINS_MAX, 1.0), [b"a"], 0) is None
    assert pins.take(PinWish(0, 1.0), [b"b"], 0) == ([b"b"], [])
    assert pins.take(PinWish(1, 1.0), [], 0) is None
    assert pins.take(PinWish(1, 1.0), [b"c"], 0) is None
    assert sorted(pins.expire(SECOND)) == [b"a", b"b"]
    assert b"a" not in pins
