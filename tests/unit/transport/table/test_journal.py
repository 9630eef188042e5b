"""The journal names every block that changed since a reader looked last, or says that it cannot."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.transport.table_fixtures import writer
from transport.keys import chain_keys, root_key
from transport.table.journal import ENTRIES, PIECE, Journal, JournalReader
from transport.table.reader import TableReader
from transport.table.writer import TableWriter

KEYS = chain_keys(root_key(b"f" * 16), range(64), 1)


def journal() -> tuple[Journal, JournalReader]:
    head, ring = np.zeros(1, np.uint64), np.zeros(ENTRIES, np.uint32)
    return Journal(head, ring), JournalReader(head.data, ring)


@given(st.lists(st.lists(st.integers(0, 1000), max_size=3 * PIECE // 1000), max_size=12))
def test_what_was_noted_since_is_named_once(noted: list[list[int]]) -> None:
    owner, reader = journal()
    for blocks in noted:
        after = reader.head[0]
        owner.note(blocks)
        found = reader.since(after)
        assert found is not None
        assert found.tolist() == sorted(set(blocks))


def test_the_ring_is_read_across_its_end() -> None:
    owner, reader = journal()
    owner.note(range(ENTRIES - 2))
    after = reader.head[0]
    owner.note([7, 8, 9, 10])
    found = reader.since(after)
    assert found is not None
    assert found.tolist() == [7, 8, 9, 10]


def test_who_fell_too_far_behind_is_told_so() -> None:
    owner, reader = journal()
    owner.note(range(ENTRIES - PIECE))
    assert reader.since(0) is not None
    owner.note([1])
    assert reader.since(0) is None
    assert reader.since(reader.head[0] + 5) is None  # of an earlier life of the table
    after = reader.head[0]
    owner.note_all()
    assert reader.since(after) is None


@pytest.fixture
def table(tmp_path: Path) -> Iterator[tuple[TableWriter, TableReader]]:
    made = writer(tmp_path, blocks=64)
    reader = TableReader(made.path)
    yield made, reader
    reader.close()
    made.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 63), st.integers(1, 4)), max_size=40))
def test_a_copy_that_follows_the_journal_equals_the_table(
    table: tuple[TableWriter, TableReader], moves: list[tuple[bool, int, int]]
) -> None:
    owner, reader = table
    owner.clear()
    states, keys = reader.content(np.arange(64))
    after = reader.journal.head[0]
    for place, (offer, first, count) in enumerate(moves):
        blocks = list(range(first, min(64, first + count)))
        if offer:
            owner.publish(blocks, KEYS[place : place + len(blocks)])
        else:
            owner.invalidate(blocks)
        if place % 3 == 0:
            head, changed = reader.journal.head[0], reader.journal.since(after)
            assert changed is not None
            states[changed], keys[changed] = reader.content(changed)
            after = head
    changed = reader.journal.since(after)
    assert changed is not None
    states[changed], keys[changed] = reader.content(changed)
    now, keys_now = reader.content(np.arange(64))
    assert (states == now).all()
    held = now & np.uint64(1) == 0
    assert (keys[held] == keys_now[held]).all()
