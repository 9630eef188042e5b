"""The block table: what one writer offers, readers find; in any doubt they find nothing."""

import gc
import os
import resource
import signal
import struct
import time
from contextlib import closing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transport.table_fixtures import description, writer
from transport.errors import TableError
from transport.groups import Group
from transport.keys import chain_keys, root_key
from transport.table.directory import DRAFT_SECONDS_MAX, TableDirectory, sweep
from transport.table.reader import COUNTERS, TableReader
from transport.table.writer import TableWriter

ROOT = root_key(b"f" * 16)
KEYS = chain_keys(ROOT, range(64 * 4), 4)


def test_a_published_run_is_found_up_to_the_first_gap(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        table.publish([5, 9, 7, 1], KEYS[:4])
        assert reader.longest_run(KEYS).block_ids.tolist() == [5, 9, 7, 1]
        table.invalidate([7])
        run = reader.longest_run(KEYS)
        assert run.block_ids.tolist() == [5, 9]
        assert (run.states % 2 == 0).all()
        assert reader.longest_run(KEYS[3:]).block_ids.tolist() == [1]
        assert reader.longest_run(KEYS[:0]).block_ids.tolist() == []


def test_a_table_without_a_writer_looks_dead_and_a_reader_that_is_let_go_leaves_no_descriptor(tmp_path):
    table = writer(tmp_path)
    before = set(os.listdir("/proc/self/fd"))
    reader = TableReader(table.path)
    assert reader.alive()
    del table
    gc.collect()
    assert not reader.alive()
    del reader
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) < before


def test_a_state_never_returns_to_a_former_value(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        seen = set()
        for _ in range(5):
            table.publish([3], KEYS[:1])
            run = reader.longest_run(KEYS[:1])
            assert int(run.states[0]) not in seen
            seen.add(int(run.states[0]))
            assert reader.unchanged(run.block_ids, run.states).all()
            table.invalidate([3])
            assert not reader.unchanged(run.block_ids, run.states).any()
            table.publish([3], KEYS[:1])
            assert not reader.unchanged(run.block_ids, run.states).any()
            table.invalidate([3])


def test_publishing_again_under_the_same_key_keeps_readers_valid(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        table.publish([3], KEYS[:1])
        run = reader.longest_run(KEYS[:1])
        table.publish([3], KEYS[:1])
        assert reader.unchanged(run.block_ids, run.states).all()
        table.publish([3], KEYS[1:2])
        assert not reader.unchanged(run.block_ids, run.states).any()
        assert len(reader.longest_run(KEYS[:1])) == 0
        assert len(reader.longest_run(KEYS[1:2])) == 1


def test_a_full_table_finds_every_block_it_holds(tmp_path):
    blocks = 60_000
    keys = chain_keys(ROOT, range(blocks * 4), 4)
    with closing(writer(tmp_path, blocks=blocks)) as table, closing(TableReader(table.path)) as reader:
        for start in range(0, blocks, 500):
            table.publish(list(range(start, start + 500)), keys[start : start + 500])
        assert len(reader.longest_run(keys)) == reader.cached_blocks() == blocks
        table.publish(list(range(blocks)), keys[::-1])
        assert len(reader.longest_run(keys)) == reader.cached_blocks() == blocks


def test_blocks_of_the_same_content_do_not_push_others_out_of_the_index(tmp_path):
    prefix, repeated, copies = 10_000, 2_500, 20
    keys = chain_keys(ROOT, range((prefix + repeated) * 4), 4)
    with closing(writer(tmp_path, blocks=60_000)) as table, closing(TableReader(table.path)) as reader:
        table.publish(list(range(prefix)), keys[:prefix])
        for copy in range(copies):
            first = prefix + copy * repeated
            table.publish(list(range(first, first + repeated)), keys[prefix:])
        assert reader.cached_blocks() == 60_000
        assert len(reader.longest_run(keys)) == len(keys)


def test_a_reader_sees_how_many_blocks_were_given_to_others(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        assert reader.evicted_blocks() == 0
        table.publish([3, 9], KEYS[:2])
        table.count("evictions", table.invalidate([3, 4]))
        assert (reader.evicted_blocks(), reader.cached_blocks()) == (1, 1)


def test_a_block_that_the_index_lost_is_found_again_when_it_is_offered_again(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        table.publish([3, 9], KEYS[:2])
        table.publish([4], KEYS[:1])
        table._index[:] = 0
        assert len(reader.longest_run(KEYS[:2])) == 0
        table.publish([3, 9], KEYS[:2])
        assert reader.longest_run(KEYS[:2]).block_ids.tolist() == [3, 9]
        assert reader.cached_blocks() == 3
        table.invalidate([3])
        assert len(reader.longest_run(KEYS[:2])) == 0
        table.publish([4], KEYS[:1])
        assert reader.longest_run(KEYS[:2]).block_ids.tolist() == [4, 9]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.lists(st.tuples(st.integers(0, 31), st.integers(0, 31)), max_size=8)),
        st.tuples(st.just("invalidate"), st.lists(st.integers(0, 31), max_size=8)),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=30,
)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_the_table_agrees_with_a_dictionary(tmp_path_factory, operations):
    path = tmp_path_factory.mktemp("model")
    offered: dict[int, int] = {}
    with closing(writer(path, blocks=32)) as table, closing(TableReader(table.path)) as reader:
        for name, argument in operations:
            if name == "publish":
                pairs = dict(argument)
                table.publish(list(pairs), KEYS[list(pairs.values())] if pairs else KEYS[:0])
                offered.update(pairs)
            elif name == "invalidate":
                gone = table.invalidate(argument)
                assert gone == sum(offered.pop(block, None) is not None for block in dict.fromkeys(argument))
            else:
                assert table.clear() == len(offered)
                offered.clear()
            assert reader.cached_blocks() == len(offered)
            for place in range(32):
                run = reader.longest_run(KEYS[place : place + 1])
                holders = {block for block, key in offered.items() if key == place}
                assert set(run.block_ids.tolist()) <= holders
                assert len(run) == min(1, len(holders))


def test_counters_and_heartbeat_reach_the_readers(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        for amount, name in enumerate(COUNTERS, 1):
            table.count(name, amount)
        table.beat(77)
        assert reader.counters() == {name: amount for amount, name in enumerate(COUNTERS, 1)}
        assert reader.heartbeat_ns() == 77


def test_an_owner_that_closes_is_dead_to_its_readers_and_leaves_no_file(tmp_path):
    table = writer(tmp_path)
    reader = TableReader(table.path)
    directory = TableDirectory(tmp_path)
    assert reader.alive()
    assert list(directory.tables()) == ["replica-0"]
    table.close()
    table.close()
    assert not reader.alive()
    assert not directory.tables()
    assert os.listdir(tmp_path) == []


def test_a_table_that_ends_is_dead_to_its_readers_whatever_it_says(tmp_path):
    table = writer(tmp_path)
    table.publish([1], KEYS[:1])
    reader = TableReader(table.path)
    table.end()
    assert not reader.alive()
    assert os.listdir(tmp_path) == []


def test_a_killed_owner_is_dead_at_once_though_its_file_stays_and_is_swept(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        held = writer(tmp_path)
        os.write(told, b"x")
        signal.pause()
        os._exit(int(held is None))
    try:
        assert os.read(ready, 1) == b"x"
        directory = TableDirectory(tmp_path)
        assert list(directory.tables()) == ["replica-0"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not directory.tables()
    assert sweep(tmp_path, now=0.0) == 1
    assert os.listdir(tmp_path) == []
    os.close(ready)
    os.close(told)


def test_a_fork_of_the_owner_does_not_keep_its_epoch_alive(tmp_path):
    table = writer(tmp_path)
    reader = TableReader(table.path)
    (ready, told), (done, hold) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(hold)
        os.write(told, b"x")
        os.read(done, 1)
        os._exit(0)
    assert os.read(ready, 1) == b"x"
    table.close()
    alive = reader.alive()
    for fd in (hold, done, ready, told):
        os.close(fd)
    os.waitpid(child, 0)
    assert not alive


def test_a_live_replicas_name_is_not_taken_from_it(tmp_path):
    with closing(writer(tmp_path)):
        with pytest.raises(TableError, match="belongs to a live replica"):
            writer(tmp_path)
        assert sweep(tmp_path, now=0.0) == 0


def test_a_restarted_owner_is_found_in_a_new_epoch(tmp_path):
    directory = TableDirectory(tmp_path)
    first = writer(tmp_path)
    epoch = directory.tables()["replica-0"].epoch
    first.close()
    with closing(writer(tmp_path)):
        assert directory.tables()["replica-0"].epoch != epoch


def test_a_table_that_comes_within_one_tick_of_the_file_systems_clock_is_found(tmp_path):
    directory, tick = TableDirectory(tmp_path), time.time_ns() + 10**9
    with closing(writer(tmp_path, "replica-0")):
        os.utime(tmp_path, ns=(tick, tick))
        assert set(directory.tables()) == {"replica-0"}
        with closing(writer(tmp_path, "replica-1")):
            os.utime(tmp_path, ns=(tick, tick))
            assert set(directory.tables()) == {"replica-0", "replica-1"}
    directory.close()


def test_a_directory_that_rests_is_not_read_again(tmp_path, monkeypatch):
    directory, long_ago = TableDirectory(tmp_path), time.time_ns() - 10**10
    with closing(writer(tmp_path, "replica-0")):
        os.utime(tmp_path, ns=(long_ago, long_ago))
        assert set(directory.tables()) == {"replica-0"}
        monkeypatch.setattr(os, "scandir", lambda path: pytest.fail("it was read again"))
        assert set(directory.tables()) == {"replica-0"}
    directory.close()


def test_of_tables_that_are_held_a_dead_owners_is_gone_a_moment_later(tmp_path):
    now = [100.0]
    directory = TableDirectory(tmp_path, hold_seconds=1.0, clock=lambda: now[0])
    with closing(writer(tmp_path)):
        assert set(directory.tables()) == {"replica-0"}
    now[0] += 0.9
    assert set(directory.tables()) == {"replica-0"}
    now[0] += 0.2
    assert not directory.tables()


def test_the_asking_replicas_own_table_is_left_out(tmp_path):
    with closing(writer(tmp_path)), closing(writer(tmp_path, "replica-1")):
        assert list(TableDirectory(tmp_path, "replica-0").tables()) == ["replica-1"]


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"X"), (8, struct.pack("<I", 99)), (28, struct.pack("<I", 10**9)), (32, struct.pack("<I", 3)), (40, b"\xff" * 4)],
)
def test_a_damaged_header_is_refused_not_believed(tmp_path, offset, value):
    with closing(writer(tmp_path)) as table:
        table._map[offset : offset + len(value)] = value
        with pytest.raises(TableError):
            TableReader(table.path)
        assert not TableDirectory(tmp_path).tables()


def test_a_truncated_table_is_refused(tmp_path):
    with closing(writer(tmp_path)) as table:
        (tmp_path / "short.table").write_bytes(table.path.read_bytes()[:-4096])
        with pytest.raises(TableError):
            TableReader(tmp_path / "short.table")


def test_a_table_that_gives_another_name_is_left_out(tmp_path):
    with closing(writer(tmp_path)) as table:
        os.link(table.path, tmp_path / "impostor.table")
        assert list(TableDirectory(tmp_path).tables()) == ["replica-0"]


def test_an_index_entry_beyond_the_table_is_no_hit(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        table.publish([1], KEYS[:1])
        table._index[table._index > 0] = 2**31
        assert len(reader.longest_run(KEYS)) == 0


def test_drafts_of_the_dead_are_swept_when_they_are_old(tmp_path):
    draft = tmp_path / ".replica-0.1.2"
    draft.write_bytes(b"")
    assert sweep(tmp_path, now=draft.stat().st_mtime) == 0
    assert sweep(tmp_path, now=draft.stat().st_mtime + DRAFT_SECONDS_MAX + 1) == 1


def test_an_oversized_table_is_refused_before_memory_is_taken(tmp_path):
    with pytest.raises(TableError, match="out of bounds"):
        TableWriter(tmp_path, description(), 4, 1 << 40)
    assert os.listdir(tmp_path) == []


def test_out_of_descriptors_a_directory_keeps_what_it_knows_and_finds_the_rest_later(tmp_path):
    directory = TableDirectory(tmp_path)
    first = writer(tmp_path, "replica-0")
    assert list(directory.tables()) == ["replica-0"]
    second = writer(tmp_path, "replica-1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(least_free := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (least_free, hard))
    try:
        assert list(directory.tables()) == ["replica-0"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (least_free + 1, hard))  # the directory can be read, no table opened
        assert list(directory.tables()) == ["replica-0"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(directory.tables()) == ["replica-0", "replica-1"]
    directory.close()
    first.close()
    second.close()


FULL = Group("full", 4)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ((FULL,) * 64, None),
        ((FULL, Group("window", 8, 5), Group("state", 12)), None),
        ((FULL,) * 65, "65 groups"),
        ((FULL, Group("state", 0)), "block size"),
        ((FULL, Group("state", -4)), "block size"),
        ((FULL, Group("chunk", 4, 0)), "window"),
        ((FULL, Group("window", 4, -1)), "window"),
        ((Group("full", 8), Group("state", 8)), "8 tokens, not 4"),
        ((FULL, Group("state", 6)), "2 tokens, not 4"),
    ],
    ids=str,
)
def test_a_table_whose_groups_can_not_be_is_none(tmp_path, groups, said):
    about = msgspec.structs.replace(description("a"), groups=groups)
    with closing(TableWriter(tmp_path, about, 4, 64)) as table:
        if said is None:
            with closing(TableReader(table.path)) as reader:
                assert reader.groups == groups
        else:
            with pytest.raises(TableError, match=said):
                TableReader(table.path)
