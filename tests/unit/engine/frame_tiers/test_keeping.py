"""What stays on a disk although its segment gives way: other tenants' frames in the flood of one, and pinned ones."""

import pytest

from engine.frame_tiers.archive import frames_on_disk
from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.disk.segment import HEAD
from engine.frame_tiers.store import frame_id
from tests.unit.engine.frame_tiers.frames import FINGERPRINT, SHAPE, SIZE, content, fetched, key, soon
from transport.frames import codecs
from transport.frames.codec import Block
from transport.frames.errors import FrameDamaged
from transport.frames.frame import read_header, write
from transport.table.quality import TENANT_MARK_MAX, tenant_mark

SEGMENT = 4 * SIZE + HEAD.size
BUDGET = 10 * SEGMENT
ANNE, BERT = tenant_mark("anne"), tenant_mark("bert")


def frame(number, tenant):
    return write(codecs.named("raw"), Block(SHAPE, content(number)), fingerprint=FINGERPRINT, key=key(number), tenant=tenant)


def ids(numbers):
    return [frame_id(frame(number, 0)) for number in numbers]


def put(store, tenant, numbers):
    """Write frames as they come: a few at a time."""
    numbers = list(numbers)
    for first in range(0, len(numbers), 3):
        own = [frame(number, tenant) for number in numbers[first : first + 3]]
        store.put([(frame_id(each), each) for each in own])


def held(store, numbers):
    return [number for number, there in zip(numbers, store.holds(ids(numbers), soon()), strict=True) if there]


@pytest.fixture
def opened(tmp_path):
    """Opens stores in one directory, and closes them."""
    stores = []

    def open_store(**about):
        for store in stores:
            store.close()
        about = {"segment_bytes": SEGMENT, "tenant_share_max": 0.5, "pin_share_max": 0.25} | about
        stores.append(DiskStore(tmp_path, BUDGET, **about))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def test_a_flood_of_one_tenant_does_not_push_out_another_ones_frames(opened, tmp_path):
    store = opened()
    for number in range(10):  # mixed with the flood's first frames, as it is written
        put(store, BERT, [number])
        put(store, ANNE, [1000 + number])
    put(store, ANNE, range(2000, 2400))
    assert held(store, range(10)) == list(range(10))
    assert set(fetched(store, range(10))) == set(range(10))
    stats = store.stats()
    assert 0 < stats.moved_frames < stats.stored_frames == 420
    assert stats.bytes <= BUDGET
    assert stats.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.frames"))
    assert stats.stored_frames == stats.frames + stats.evicted_frames


def test_without_a_bound_it_does(opened):
    store = opened(tenant_share_max=1.0)
    put(store, BERT, range(10))
    put(store, ANNE, range(2000, 2400))
    assert held(store, range(10)) == []


def test_a_tenant_has_the_whole_disk_until_others_want_room(opened):
    store = opened()
    put(store, ANNE, range(1000, 1100))
    assert len(held(store, range(1000, 1100))) > 35
    put(store, BERT, range(16))
    assert held(store, range(16)) == list(range(16))
    put(store, BERT, range(100, 400))
    assert 14 <= len(held(store, range(1000, 1100))) <= 22  # about half, in whole segments


@pytest.mark.parametrize("segments", [4, 5, 10])
def test_of_two_tenants_with_half_each_neither_gets_a_segment_of_the_others(opened, segments):
    store = opened(segment_bytes=BUDGET // segments)  # of which a little stays empty
    half = segments // 2 * (BUDGET // segments // SIZE)
    put(store, ANNE, range(1000, 1000 + half))
    put(store, BERT, range(400))
    assert held(store, range(1000, 1000 + half)) == list(range(1000, 1000 + half))
    assert len(held(store, range(400))) >= half - BUDGET // segments // SIZE


def test_whose_frames_they_are_is_known_after_a_restart(opened):
    store = opened()
    put(store, BERT, range(10))
    put(store, ANNE, range(1000, 1020))
    store = opened()
    put(store, ANNE, range(2000, 2200))
    assert held(store, range(10)) == list(range(10))


def test_a_pinned_prefix_outlives_a_flood_and_unpinning_ends_that(opened):
    store = opened()
    put(store, ANNE, range(8))
    store.hold([ids(range(8))])
    put(store, ANNE, range(1000, 1300))
    assert held(store, range(8)) == list(range(8))
    assert set(fetched(store, range(8))) == set(range(8))
    store.hold([])
    put(store, ANNE, range(2000, 2300))
    assert held(store, range(8)) == []


def test_a_pinned_prefix_outlives_its_time_to_live_and_others_do_not(opened):
    now = [1000.0]
    store = opened(ttl_seconds=80, clock=lambda: now[0])
    put(store, ANNE, range(6))
    store.hold([ids(range(3))])
    for _ in range(3):
        now[0] += 81
        store.tend()
        assert held(store, range(6)) == [0, 1, 2]
    assert (store.stats().expired_frames, store.stats().moved_frames) == (3, 9)
    store.hold([])
    now[0] += 81
    store.tend()
    assert held(store, range(6)) == []


@pytest.mark.parametrize("pinned", [1, 2, 3])
def test_what_expires_may_already_have_given_way_to_what_was_written_anew(opened, pinned):
    now = [1e9]
    about = {"ttl_seconds": 80, "clock": lambda: now[0], "pin_share_max": 1.0}
    pins = [number for number in range(38) if number % 4 < pinned]
    put(opened(**about), ANNE, range(38))
    store = opened(segment_bytes=6 * SIZE + HEAD.size, **about)
    store.hold([ids(pins)])
    put(store, ANNE, range(100, 104))
    now[0] += 100
    store.tend()
    assert held(store, pins) == pins


def test_pins_take_their_share_of_a_disk_at_most(opened):
    store = opened()
    put(store, ANNE, range(30))
    store.hold([ids(range(30))])
    put(store, ANNE, range(1000, 1300))
    assert held(store, range(30)) == list(range(BUDGET // 4 // SIZE))
    assert len(held(store, range(1290, 1300))) == 10


def test_a_flush_takes_what_is_pinned_too(opened):
    store = opened()
    put(store, ANNE, range(4))
    store.hold([ids(range(4))])
    assert store.flush() == ""
    assert (held(store, range(4)), store.stats().bytes) == ([], 0)
    put(store, ANNE, range(4))
    assert held(store, range(4)) == [0, 1, 2, 3]


def test_a_damaged_segment_does_not_stop_what_gives_way(opened, tmp_path):
    store = opened()
    put(store, BERT, range(4))
    next(iter(tmp_path.glob("*.frames"))).unlink()
    put(store, ANNE, range(1000, 1300))
    assert store.stats().bytes <= BUDGET
    assert len(held(store, range(1290, 1300))) == 10


def test_a_frame_says_whose_it_is_and_one_with_an_impossible_mark_is_damaged(opened, tmp_path):
    put(opened(), ANNE, [1])
    found = list(frames_on_disk(tmp_path, lambda each: True))
    assert [read_header(each).tenant for each in found] == [ANNE]
    with pytest.raises(FrameDamaged):
        read_header(frame(1, TENANT_MARK_MAX + 1))
