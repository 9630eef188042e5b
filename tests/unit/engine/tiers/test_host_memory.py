"""The host-memory tier: what is stored, in which slot, and what gives way."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.host_process.kept_memory import decode_kept, encode_kept
from engine.tiers.host_memory import UNDER_WAY_MAX, HostMemory
from engine.tiers.only_writer import become_only_writer
from engine.tiers.slots import NoSlots, cut
from engine.tiers.stores import NO_STORES
from tests.unit.engine.keeper import Keeper
from tests.unit.transport.table_fixtures import description
from transport.errors import MemoryUnreachable, TableError
from transport.keys import chain_keys, root_key
from transport.table.kept_table import KeptTable
from transport.table.layout import Layer, Memory, Region
from transport.table.reader import TableReader

KEYS = chain_keys(root_key(b"f" * 16), range(4 * (UNDER_WAY_MAX + 64)), 4)
NAME = "replica-0.host-memory"
REGION = 1 << 16


@pytest.fixture
def keeper(tmp_path):
    return Keeper(tmp_path)


def table_of(keeper, path: Path, slots=4, **about) -> KeptTable:
    return KeptTable(path, description(NAME, **about), 4, slots, Path(keeper.keep("replica-0", REGION).draft))


def nowhere(keys):
    return np.zeros(len(keys), np.bool_)


@pytest.fixture
def tier(keeper, tmp_path):
    """A tier of four slots, and a reader of its table."""
    table = table_of(keeper, tmp_path)
    with closing(TableReader(table.path)) as reader:
        yield HostMemory(table, ranks=1, elsewhere=nowhere), reader


def take(memory, *places):
    memory.take([10 + place for place in places], KEYS[list(places)], [0] * len(places), [0] * len(places))


def store(memory, *places):
    """Have the blocks of these keys stored, one step each."""
    for place in places:
        take(memory, place)
        memory.copied({each.slot: 1 for each in memory.take_stores().begun})


def held(reader):
    return [place for place in range(64) if reader.look_up(KEYS[place : place + 1])[0].any()]


def test_a_block_is_on_offer_once_it_is_copied_and_not_before(tier):
    memory, reader = tier
    take(memory, 0, 1)
    stores = memory.take_stores()
    assert [(each.block, each.key) for each in stores.begun] == [(10, KEYS[0].tobytes()), (11, KEYS[1].tobytes())]
    assert held(reader) == []
    memory.copied({stores.begun[1].slot: 1})
    assert held(reader) == [1]
    assert memory.take_stores() is NO_STORES


def test_every_rank_must_have_copied(keeper, tmp_path):
    table = table_of(keeper, tmp_path)
    memory = HostMemory(table, ranks=2, elsewhere=nowhere)
    with closing(TableReader(table.path)) as reader:
        take(memory, 0)
        slot = memory.take_stores().begun[0].slot
        memory.copied({slot: 1})
        assert held(reader) == []
        memory.copied({slot: 1})
        assert held(reader) == [0]


def test_of_equally_popular_blocks_the_least_recently_used_gives_way_before_its_slot_is_written(tier):
    memory, reader = tier
    store(memory, 0, 1, 2, 3)
    take(memory, 0)  # about to be lost once more, and here already
    assert memory.take_stores() is NO_STORES
    run = reader.look_up(KEYS[1:2])
    memory.restored(run[1].tolist())
    _, slot, state = reader.look_up(KEYS[2:3])
    take(memory, 4)
    assert held(reader) == [0, 1, 3]
    assert not reader.unchanged(slot, state).any()
    memory.copied({each.slot: 1 for each in memory.take_stores().begun})
    assert held(reader) == [0, 1, 3, 4]
    assert reader.counters()["evictions"] == 1


def test_however_many_blocks_a_step_stores_the_table_is_told_once_of_what_gives_way_and_once_of_what_is_there(
    tier, monkeypatch
):
    """A call takes the table as long for one block as for hundreds."""
    memory, reader = tier
    store(memory, 0, 1, 2, 3)
    calls = []
    for name in ("publish", "invalidate"):
        call = getattr(KeptTable, name)
        monkeypatch.setattr(KeptTable, name, lambda *given, call=call, name=name: (calls.append(name), call(*given))[1])
    take(memory, 4, 5, 6)
    assert (calls, held(reader)) == (["invalidate"], [3])
    memory.copied({each.slot: 1 for each in memory.take_stores().begun})
    assert (calls, held(reader)) == (["invalidate", "publish"], [3, 4, 5, 6])
    assert reader.counters()["evictions"] == 3


def test_the_least_popular_gives_way_whether_it_was_asked_for_before_it_was_stored_or_after(tier):
    memory, reader = tier
    memory.asked(KEYS[[0, 1]])
    memory.asked(KEYS[[0]])
    store(memory, 0, 1, 2, 3)
    memory.asked(KEYS[[1]])
    take(memory, 1)
    store(memory, 4, 5)
    assert held(reader) == [0, 1, 4, 5]


def test_what_is_asked_for_while_it_is_nowhere_is_popular_when_it_is_stored(tier):
    memory, reader = tier
    for _ in range(3):
        memory.asked(KEYS[[0]])
    store(memory, 0, 1, 2, 3, 4)
    assert held(reader) == [0, 2, 3, 4]


def test_what_is_being_read_does_not_give_way_before_the_read_ended(tier):
    memory, reader = tier
    store(memory, 0)
    slot = reader.look_up(KEYS[:1])[1].tolist()
    for _ in range(5):
        memory.asked(KEYS[1:4])
    store(memory, 1, 2, 3)
    memory.restored([*slot, 1 << 40])
    take(memory, *range(4, 9))  # more than there are others
    assert held(reader) == [0]
    assert reader.counters()["tier_dropped_blocks"] == 2
    memory.copied({each.slot: 1 for each in memory.take_stores().begun})
    memory.read([*slot, 1 << 40])
    store(memory, *range(9, 13))
    assert 0 not in held(reader)


def test_what_is_being_stored_keeps_its_slot_and_more_than_fits_is_dropped_and_counted(tier):
    memory, reader = tier
    take(memory, *range(7))
    assert [each.block for each in memory.take_stores().begun] == [10, 11, 12, 13]
    assert reader.counters()["tier_dropped_blocks"] == 3


def test_stores_under_way_are_bounded(keeper, tmp_path):
    memory = HostMemory(table_of(keeper, tmp_path, slots=UNDER_WAY_MAX + 64), ranks=1, elsewhere=nowhere)
    take(memory, *range(UNDER_WAY_MAX + 5))
    assert len(memory.take_stores().begun) == UNDER_WAY_MAX


def test_a_key_that_comes_twice_is_stored_once_and_nothing_gives_way_for_the_second(tier):
    memory, reader = tier
    store(memory, 0, 1, 2)
    memory.take([20, 21], KEYS[[3, 3]], [0, 0], [0, 0])
    (begun,) = memory.take_stores().begun
    memory.copied({begun.slot: 1})
    assert held(reader) == [0, 1, 2, 3]


def test_what_another_tier_holds_is_not_stored_again(keeper, tmp_path):
    memory = HostMemory(table_of(keeper, tmp_path), ranks=1, elsewhere=lambda keys: (keys == KEYS[1]).all(axis=1))
    take(memory, 0, 1, 2)
    assert [each.block for each in memory.take_stores().begun] == [10, 12]


def test_only_what_is_being_stored_is_waited_for(tier):
    memory, _ = tier
    take(memory, 0)
    first = memory.take_stores()
    memory.overwritten([10, 11])
    assert memory.take_stores().overwritten == {10}
    memory.copied({first.begun[0].slot: 1})
    memory.overwritten([10])
    assert memory.take_stores() is NO_STORES


def test_what_a_worker_lost_is_not_offered_counts_as_dropped_and_gives_its_slot_back(keeper, tmp_path):
    table = table_of(keeper, tmp_path)
    memory = HostMemory(table, ranks=2, elsewhere=nowhere)
    with closing(TableReader(table.path)) as reader:
        take(memory, 0, 1)
        first, second = (each.slot for each in memory.take_stores().begun)
        memory.copied({first: 1, second: 2}, [first])
        take(memory, 0)  # its slot is being written by the other worker: another one is taken
        (again,) = memory.take_stores().begun
        memory.copied({first: 1, again.slot: 2}, [first])
        assert held(reader) == [0, 1]
        assert reader.counters()["tier_dropped_blocks"] == 1
        take(memory, 2, 3)
        assert first in [each.slot for each in memory.take_stores().begun]


def test_workers_are_told_what_is_overwritten_before_they_hear_of_the_step(tier):
    memory, _ = tier
    take(memory, 0)
    memory.lost([10, 11])
    assert memory.take_stores().lost == {10}
    memory.lost([10])
    assert memory.take_stores().lost == {10}  # it is not known to be copied yet


def test_a_flush_gives_up_what_is_stored_and_what_is_under_way(tier):
    memory, reader = tier
    store(memory, 0, 1)
    take(memory, 2)
    under_way = memory.take_stores().begun[0].slot
    memory.restored(reader.look_up(KEYS[:1])[1].tolist())
    memory.clear()
    memory.copied({under_way: 1})
    assert held(reader) == []
    store(memory, 2, 3, 4, 5)  # all four slots are free again
    assert held(reader) == [2, 3, 4, 5]


def test_the_next_writer_goes_on_with_what_the_last_one_stored(tier, keeper, tmp_path):
    memory, reader = tier
    store(memory, 0, 1)
    take(memory, 2)  # its engine dies before this is copied
    again = HostMemory(table_of(keeper, tmp_path), ranks=1, elsewhere=nowhere)
    assert held(reader) == [0, 1]
    assert reader.alive()
    store(again, 0, 2, 3)
    assert held(reader) == [0, 1, 2, 3]


def test_a_table_of_another_fingerprint_is_withdrawn_and_replaced(tier, keeper, tmp_path):
    memory, former = tier
    store(memory, 0, 1)
    table = table_of(keeper, tmp_path, fields={"weights": "w2"})
    assert held(former) == []
    with closing(TableReader(table.path)) as reader:
        assert (reader.alive(), held(reader)) == (True, [])
    keeper.keep("replica-0", REGION)
    assert not former.alive()


def test_a_table_ends_with_its_keeper(tier, keeper):
    _, reader = tier
    assert reader.alive()
    keeper.end()
    assert not reader.alive()


def test_a_draft_that_nobody_locked_is_refused(tmp_path):
    (tmp_path / "draft").touch()
    with pytest.raises(TableError, match="locked"):
        KeptTable(tmp_path, description(NAME), 4, 4, tmp_path / "draft")


def test_what_is_kept_goes_through_the_environment_and_drafts_that_nobody_used_are_removed(keeper, tmp_path):
    first = keeper.keep("replica-0", REGION)
    assert decode_kept(encode_kept(first)) == first
    second = keeper.keep("replica-0", REGION)
    assert second.region == first.region
    assert [path.name for path in tmp_path.iterdir()] == [Path(second.draft).name]


def test_an_engine_does_not_write_what_another_one_writes(keeper):
    region = keeper.keep("replica-0", REGION).region
    become_only_writer(region)
    with pytest.raises(MemoryUnreachable, match="another engine"):
        become_only_writer(region, wait_seconds=0.05)


LAYERS = (Layer(0, 0, 100, 100, 0), Layer(0, 100, 100, 100, 0), Layer(1, 0, 64, 60, 1))


@pytest.mark.parametrize("rank", [0, 1])
def test_slots_lie_apart_and_within_the_ranks_part(rank):
    slots = cut(Region("", 10_000), Memory(rank, "shared_memory", (), LAYERS), 2)
    begin, end = 5_000 // 64 * 64 * rank, 5_000 // 64 * 64 * (rank + 1)
    taken: set[int] = set()
    sums = slots.memory.checksums
    for slot in range(slots.count):
        for group in (0, 1):
            places = {
                byte
                for layer in slots.memory.layers
                if layer.group == group
                for byte in range(layer.offset + slot * layer.stride, layer.offset + slot * layer.stride + layer.bytes)
            }
            assert len(places) == (200 if group == 0 else 60)
            checksum = set(range(sums.offset + slot * sums.stride, sums.offset + slot * sums.stride + 16))
            assert not places & checksum
            assert not (places | checksum) & taken
            assert begin <= min(places)
            assert max(checksum) < end
        taken |= places | checksum
    assert slots.count == 5_000 // 64 * 64 // sums.stride


@pytest.mark.parametrize(
    ("size", "transport", "why"), [(100, "shared_memory", "less than one block"), (10_000, "rdma", "rdma")]
)
def test_there_are_no_slots_for_too_little_memory_or_another_kind(size, transport, why):
    with pytest.raises(NoSlots, match=why):
        cut(Region("", size), Memory(0, transport, (), LAYERS), 1)
