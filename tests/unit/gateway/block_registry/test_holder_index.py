"""The index tells what asking every table would tell."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.block_registry.holder_index import HolderIndex, Lengths, places
from gateway.block_registry.table_feed import AGE_SECONDS_MAX, FEW_TABLES, PIECE_BLOCKS, TableFeed
from tests.unit.transport.replica_tables import ReplicaTables, replica_tables
from transport.keys import chain_keys, root_key
from transport.table.journal import ENTRIES
from transport.table.reader import TableReader

CHAINS = [chain_keys(root_key(bytes([number]) * 16), range(400), 1) for number in range(3)]
# the second chain goes on from the first one's 150th block
CHAINS[1] = np.concatenate((CHAINS[0][:150], CHAINS[1][150:]))
ALL = (1 << 64) - 1


def words(chain: int, length: int = 400) -> memoryview:
    return np.ascontiguousarray(CHAINS[chain][:length]).reshape(-1).data


def by_place(lengths: Lengths) -> dict[int, int]:
    found: dict[int, int] = {}
    for bits, blocks in lengths:
        for place in places(bits):
            assert place not in found
            found[place] = blocks
    return found


holdings = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400)), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(holdings, st.integers(0, 2), st.integers(0, 400), st.integers(0, 30))
def test_leading_blocks_are_those_that_each_holder_has(
    held: list[tuple[int, int]], asked: int, length: int, begin: int
) -> None:
    index = HolderIndex()
    owned = []
    for chain, count in held:
        place = index.take_place()
        lows = CHAINS[chain][:count, 0].tolist()
        index.add(place, lows)
        owned.append(set(lows))
    wanted = CHAINS[asked][:length, 0].tolist()
    expected = {}
    for place, lows in enumerate(owned):
        end = begin
        while end < length and wanted[end] in lows:
            end += 1
        if end > begin:
            expected[place] = end
    found = index.lengths(words(asked, length), ALL, begin)
    assert by_place(found) == expected
    assert [blocks for _, blocks in found] == sorted({blocks for _, blocks in found}, reverse=True)


def test_of_very_many_lengths_the_longest_are_exact_and_none_is_too_long() -> None:
    index = HolderIndex()
    for count in range(1, 401):
        index.add(index.take_place(), CHAINS[0][:count, 0].tolist())
    found = by_place(index.lengths(words(0), (1 << 400) - 1))
    assert len(found) == 400
    assert all(found[place] <= place + 1 for place in found)
    assert all(found[place] == place + 1 for place in range(360, 400))


def test_a_gap_that_a_probe_sees_ends_a_prefix() -> None:
    index = HolderIndex()
    place = index.take_place()
    index.add(place, CHAINS[0][:, 0].tolist())
    index.remove(place, CHAINS[0][200:230, 0].tolist())
    assert by_place(index.lengths(words(0), ALL)) == {place: 200}


def test_a_block_held_twice_stays_held_until_both_are_gone() -> None:
    index = HolderIndex()
    place, low = index.take_place(), CHAINS[0][:1, 0].tolist()
    index.add(place, low)
    index.add(place, low)
    index.remove(place, low)
    assert index.held(place, low[0])
    index.remove(place, low)
    assert not index.held(place, low[0])
    assert len(index) == 0
    index.remove(place, low)  # nothing


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[ReplicaTables]:
    with replica_tables(tmp_path / "tables") as made:
        yield made


moves = st.lists(
    st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 2), st.integers(0, 200), st.integers(1, 60)), max_size=30
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(moves)
def test_the_feed_tells_what_asking_all_tables_tells(
    tables: ReplicaTables, steps: list[tuple[str, bool, int, int, int]]
) -> None:
    """Blocks come and go, and owners start anew; after every step the index and the tables agree on every single block."""
    readers = {name: restarted(tables, name) for name in "abc"}
    index = HolderIndex()
    feed = TableFeed(index)
    for number, (name, offer, chain, first, count) in enumerate(steps):
        writer = tables.writers[name]
        if offer:
            writer.publish(range(first, first + count), CHAINS[chain][first : first + count])
        else:
            writer.invalidate(range(first, first + count))
        if number % 11 == 10:
            readers[name].close()
            readers[name] = restarted(tables, name)
        feed.follow(readers)
        feed.refresh()
    feed.follow(readers)
    while feed.filling:
        feed.refresh()
    assert feed.whole.bit_count() == 3
    for name, reader in readers.items():
        for keys in CHAINS:
            held = reader.look_up(keys)[0].tolist()
            assert [index.held(feed.place(name), low) for low in keys[:, 0].tolist()] == held
    for reader in readers.values():
        reader.close()


def restarted(tables: ReplicaTables, name: str) -> TableReader:
    if name in tables.writers:
        tables.stop(name)
    tables.start(name, blocks=300, block_size=1)
    return TableReader(tables.directory / f"{name}.table")


def test_who_falls_behind_the_journal_looks_at_all_again(tables: ReplicaTables) -> None:
    writer = tables.start("a", blocks=300, block_size=1)
    reader = TableReader(tables.directory / "a.table")
    index = HolderIndex()
    feed = TableFeed(index)
    feed.follow({"a": reader})
    feed.refresh()
    assert feed.whole
    for _ in range(ENTRIES // 300 + 1):
        writer.publish(range(300), CHAINS[0][:300])
        writer.clear()
    writer.publish(range(300), CHAINS[2][:300])
    head = reader.journal.head[0]
    feed.refresh()
    assert reader.journal.head[0] == head
    while feed.filling:
        feed.refresh()
    assert by_place(index.lengths(words(2), ALL)) == {feed.place("a"): 300}
    assert index.lengths(words(0), ALL) == []
    reader.close()


def test_a_large_table_is_taken_in_by_pieces_and_given_up_so(tables: ReplicaTables) -> None:
    keys = chain_keys(root_key(b"large" * 3 + b"!"), range(2 * PIECE_BLOCKS + 5), 1)
    writer = tables.start("a", blocks=len(keys), block_size=1)
    writer.publish(range(len(keys)), keys)
    reader = TableReader(tables.directory / "a.table")
    index = HolderIndex()
    feed = TableFeed(index)
    feed.follow({"a": reader})
    feed.refresh()
    assert (len(index), feed.whole) == (PIECE_BLOCKS, 0)
    while feed.filling:
        feed.fill()
    assert (len(index), feed.whole) == (len(keys), 1)
    feed.follow({})
    assert feed.whole == 0
    while feed.filling:
        feed.fill()
    assert len(index) == 0
    reader.close()


def test_very_many_tables_are_not_all_asked_each_time_but_soon_enough_and_whenever_that_matters(tables: ReplicaTables) -> None:
    names = [f"r{number}" for number in range(FEW_TABLES + 1)]
    readers = {name: restarted(tables, name) for name in names}
    now, index = 1000.0, HolderIndex()
    feed = TableFeed(index, lambda: now)
    feed.follow(readers)
    while feed.filling:
        feed.refresh()
    now += AGE_SECONDS_MAX
    feed.refresh()
    first = CHAINS[0][0]

    def known(name: str) -> bool:
        feed.refresh()
        return index.held(feed.place(name), int(first[0]))

    tables.writers["r3"].publish([5], first.reshape(1, 2))
    assert not known("r3")
    now += AGE_SECONDS_MAX
    assert known("r3")
    tables.writers["r4"].publish([5], first.reshape(1, 2))
    assert not known("r4")
    feed.look_again()
    assert known("r4")
    few = dict(list(readers.items())[:FEW_TABLES])
    feed.follow(few)
    while feed.filling:
        feed.refresh()
    tables.writers["r5"].publish([5], first.reshape(1, 2))
    assert known("r5")
    for reader in readers.values():
        reader.close()
