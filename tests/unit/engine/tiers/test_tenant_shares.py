"""What each tenant may have of host memory: a flood of one leaves the others what they have."""

import random
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.tiers.giving_way import GivingWay
from engine.tiers.host_memory import HostMemory
from engine.tiers.slots import cut
from engine.tiers.tenant_shares import TenantShares
from tests.unit.engine.keeper import Keeper
from tests.unit.engine.tiers.test_coded_slots import OWN, SHAPE
from tests.unit.transport.table_fixtures import description
from transport.hint import PinWish
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.quality import LOSSY, lossy_salt, mark_of, marked, tenant_mark
from transport.table.reader import TableReader

NAME = "replica-0.host-memory"
SLOTS = 16
ANNE, BERT, CARL = (marked(tenant_mark(name)) for name in ("anne", "bert", "carl"))
KEYS = chain_keys(root_key(b"f" * 16), range(4 * 4096), 4)


class Tier:
    """A tier of SLOTS slots; block n of the tests' chain is stored for whom `store` says."""

    def __init__(self, path: Path, share_max=0.5, **about):
        self.path, self.about = path, about
        self.keeper = Keeper(path)
        self.open(share_max)

    def open(self, share_max=0.5, pin_share_max=0.5):
        draft = Path(self.keeper.keep("replica-0", 1 << 16).draft)
        self.table = KeptTable(self.path, description(NAME, **self.about), 4, SLOTS, draft)
        self.memory = HostMemory(
            self.table,
            ranks=1,
            elsewhere=lambda keys: np.zeros(len(keys), np.bool_),
            tenant_share_max=share_max,
            pin_share_max=pin_share_max,
        )
        self.reader = TableReader(self.table.path)

    def store(self, quality, *places):
        """Have the blocks of these keys stored, one step each."""
        for place in places:
            self.memory.take([place], KEYS[place : place + 1], [0], [quality])
            self.copy()

    def pin(self, quality, places):
        wish = PinWish(id=places[0], seconds=60)
        self.memory.pin(wish, places, KEYS[places.start : places.stop], [0] * len(places), [quality] * len(places), 0)
        self.copy()

    def copy(self):
        self.memory.copied({each.slot: 1 for each in self.memory.take_stores().begun})

    def held(self, places):
        return [place for place in places if self.reader.look_up(KEYS[place : place + 1])[0].any()]


@pytest.fixture
def tier(tmp_path):
    found = Tier(tmp_path)
    with closing(found.reader):
        yield found


def test_a_flood_of_one_tenant_does_not_push_out_what_another_has(tier):
    tier.store(BERT, *range(8))
    tier.store(ANNE, *range(100, 300))
    assert tier.held(range(8)) == list(range(8))
    assert tier.held(range(100, 300)) == list(range(292, 300))


def test_without_a_bound_it_does(tmp_path):
    tier = Tier(tmp_path, share_max=1.0)
    with closing(tier.reader):
        tier.store(BERT, *range(8))
        tier.store(ANNE, *range(100, 300))
        assert tier.held(range(8)) == []


def test_a_tenant_has_more_than_its_share_until_others_want_the_room(tier):
    tier.store(ANNE, *range(100, 300))
    assert len(tier.held(range(100, 300))) == SLOTS
    tier.store(BERT, *range(4))
    assert (len(tier.held(range(100, 300))), tier.held(range(4))) == (12, [0, 1, 2, 3])
    tier.store(BERT, *range(4, 50))
    assert (len(tier.held(range(100, 300))), tier.held(range(50))) == (8, list(range(42, 50)))


def test_both_caches_of_a_tenant_have_one_share_and_callers_without_a_salt_have_one_too(tier):
    lossy = LOSSY | marked(tenant_mark(lossy_salt("anne")))
    tier.store(BERT, *range(6))
    tier.store(ANNE, *range(100, 120))
    tier.store(lossy, *range(200, 220))
    assert (len(tier.held(range(100, 300))), tier.held(range(6))) == (SLOTS - 6, list(range(6)))
    tier.store(0, *range(300, 400))
    assert len(tier.held(range(300, 400))) == SLOTS // 2


def test_whose_a_block_is_is_known_after_a_restart_of_the_engine(tier):
    tier.store(BERT, *range(8))
    tier.store(ANNE, *range(100, 108))
    tier.reader.close()
    tier.open()
    tier.store(ANNE, *range(200, 300))
    assert tier.held(range(8)) == list(range(8))


def test_a_tenant_that_only_has_coded_blocks_keeps_them_beside_a_flood_of_whole_ones(tmp_path):
    region = Keeper(tmp_path).keep("replica-1", 1 << 20).region
    tier = Tier(tmp_path, memories=(cut(region, OWN, 1, SHAPE).memory,))
    with closing(tier.reader):
        assert tier.table.coded
        order = random.Random(1)
        coded = {BERT: list(range(5)), ANNE: list(range(100, 105))}
        for place in range(5):  # side by side
            tier.store(BERT | LOSSY, coded[BERT][place])
            tier.store(ANNE | LOSSY, coded[ANNE][place])
        for place in range(200, 400):
            tier.store(ANNE if order.random() < 0.7 else ANNE | LOSSY, place)
        assert tier.held(coded[BERT]) == coded[BERT]


def test_coded_blocks_that_leave_no_room_for_a_whole_one_are_not_given_up_for_it(tmp_path):
    region = Keeper(tmp_path).keep("replica-1", 1 << 20).region
    tier = Tier(tmp_path, memories=(cut(region, OWN, 1, SHAPE).memory,))
    with closing(tier.reader):
        for place in range(SLOTS // 2):  # side by side: each of the two has its share
            tier.store(BERT | LOSSY, place)
            tier.store(ANNE | LOSSY, 100 + place)
        tier.store(ANNE, *range(200, 210))
        assert tier.held(range(300)) == [*range(8), *range(100, 108)]
        assert tier.reader.counters()["tier_dropped_blocks"] == 10
        tier.store(ANNE | LOSSY, 108)
        assert tier.held(range(300)) == [*range(8), *range(101, 109)]


def test_after_a_flush_nobody_has_anything(tier):
    tier.store(ANNE, *range(100, 120))
    tier.memory.clear()
    tier.store(BERT, *range(SLOTS))
    assert tier.held(range(SLOTS)) == list(range(SLOTS))


def test_at_random_no_tenant_below_its_share_loses_a_block_to_one_that_has_its_share(tier):
    order = random.Random(7)
    owners = {ANNE: range(1000, 2000), BERT: range(2000, 3000), CARL: range(3000, 4000)}
    names = list(owners)
    for _ in range(2000):
        own = order.choices(names, (8, 2, 1))[0]
        before = {name: len(tier.held(owners[name][:60])) for name in names}
        tier.store(own, order.choice(owners[own][:60]))
        after = {name: len(tier.held(owners[name][:60])) for name in names}
        for name in names:
            lost = name != own and after[name] < before[name]
            assert not (lost and before[own] >= 8), (before, after)
        assert sum(after.values()) <= SLOTS


def test_pins_of_one_tenant_above_its_share_do_not_keep_others_from_storing(tmp_path):
    tier = Tier(tmp_path, share_max=0.25)
    with closing(tier.reader):
        tier.pin(ANNE, range(8))  # which may be twice what its share is
        for place in range(8):  # four other tenants have the rest, none more than its share
            tier.store(marked(1 + place // 2), 100 + place)
        tier.store(BERT, *range(200, 210))
        assert tier.held(range(8)) == list(range(8))
        assert tier.held(range(200, 210)) == list(range(206, 210))
        assert tier.held(range(100, 108)) == list(range(104, 108))
        assert tier.reader.counters()["tier_dropped_blocks"] == 0


def test_where_all_of_who_has_the_most_is_pinned_the_next_above_its_share_yields(tmp_path):
    tier = Tier(tmp_path, share_max=0.25)
    with closing(tier.reader):
        tier.store(CARL, 300)
        tier.pin(ANNE, range(8))
        tier.store(BERT, *range(200, 207))
        tier.store(CARL, 301, 302, 303)
        assert tier.held(range(400)) == [*range(8), *range(203, 207), *range(300, 304)]
        assert tier.reader.counters()["tier_dropped_blocks"] == 0


def test_of_several_tenants_the_one_with_the_most_above_its_share_yields():
    shares = TenantShares(100, 0.1)
    for mark, slots in ((1, 30), (2, 50), (3, 20)):
        shares.took(mark, slots)
    assert shares.yields(4, 2) == [2, 1, 3]
    shares.took(2, -40)
    assert (shares.yields(4, 2), shares.yields(2, 2)) == ([1, 3], [2])
    shares.took(1, -25)
    shares.took(3, -15)
    assert (shares.yields(4, 2), shares.yields(1, 2)) == ([], [])


def test_a_block_of_one_tenant_gives_way_by_value_and_another_ones_stays() -> None:
    blocks = GivingWay({})
    for slot, (asked, mark) in enumerate([(1, 7), (2, 8), (1, 8), (3, 7)]):
        blocks.put(bytes([slot]) * 16, slot, asked, mark)
    assert [blocks.pop(8), blocks.pop(8), blocks.pop(8), blocks.pop(9)] == [2, 1, None, None]
    assert not blocks.may_go(0, 8)
    assert [blocks.pop(), blocks.pop(), blocks.pop()] == [0, 3, None]


def test_a_mark_says_little_and_is_in_the_state_of_a_block(tier):
    assert tenant_mark("") == tenant_mark(None) == tenant_mark(lossy_salt("")) == 0
    assert tenant_mark("anne") == tenant_mark(lossy_salt("anne")) != tenant_mark("bert")
    assert all(0 < tenant_mark(f"salt {number}") < 4096 for number in range(9000))
    tier.store(ANNE | LOSSY, 1)
    _, slot, state = tier.reader.look_up(KEYS[1:2])
    assert (mark_of(int(state[0])), tier.table.quality(slot.tolist())) == (tenant_mark("anne"), [ANNE | LOSSY])
    tier.table.invalidate(slot.tolist())
    tier.table.publish(slot.tolist(), KEYS[2:3], BERT)
    after = tier.reader.look_up(KEYS[2:3])[2]
    assert mark_of(int(after[0])) == tenant_mark("bert")
    assert not tier.reader.unchanged(slot, state).any()
