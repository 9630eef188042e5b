"""How long a run a table holds, found by halving for steering, against the exact look-up that engines use."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.transport.table_fixtures import writer
from transport.keys import Keys, chain_keys, root_key
from transport.table.reader import TableReader
from transport.table.writer import TableWriter

BLOCKS = 600
KEYS = chain_keys(root_key(b"f" * 16), range(BLOCKS), 1)
OTHERS = chain_keys(root_key(b"g" * 16), range(BLOCKS), 1)


def words(keys: Keys) -> memoryview:
    return keys.reshape(-1).data


@pytest.fixture
def table(tmp_path: Path) -> Iterator[tuple[TableWriter, TableReader]]:
    made = writer(tmp_path, blocks=2 * BLOCKS, block_size=1)
    reader = TableReader(made.path)
    yield made, reader
    reader.close()
    made.close()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(held=st.integers(0, BLOCKS), asked=st.integers(0, BLOCKS), length=st.integers(0, BLOCKS))
def test_a_run_without_gaps_is_measured_exactly(
    table: tuple[TableWriter, TableReader], held: int, asked: int, length: int
) -> None:
    made, reader = table
    made.clear()
    made.publish(range(held), KEYS[:held])
    chain = np.concatenate([KEYS[:asked], OTHERS[:length]])
    assert reader.held_blocks(words(chain)) == len(reader.longest_run(chain)) == min(held, asked)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(gap=st.integers(0, BLOCKS - 1), width=st.integers(BLOCKS // 16, BLOCKS))
def test_a_gap_as_wide_as_the_places_verified_are_apart_is_seen(
    table: tuple[TableWriter, TableReader], gap: int, width: int
) -> None:
    made, reader = table
    made.clear()
    made.publish(range(BLOCKS), KEYS)
    made.invalidate(range(gap, min(gap + width, BLOCKS)))
    assert reader.held_blocks(words(KEYS)) == len(reader.longest_run(KEYS)) == gap


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, BLOCKS), st.integers(0, BLOCKS)), min_size=2, max_size=6))
def test_where_a_run_ended_before_misleads_nobody(table: tuple[TableWriter, TableReader], runs: list[tuple[int, int]]) -> None:
    made, reader = table
    for held, asked in runs:
        made.clear()
        made.publish(range(held), KEYS[:held])
        chain = np.concatenate([KEYS[:asked], OTHERS[:20]])
        assert reader.held_blocks(words(chain)) == min(held, asked)


def test_an_index_that_points_outside_of_the_table_is_a_miss(table: tuple[TableWriter, TableReader]) -> None:
    made, reader = table
    made.publish([0], KEYS[:1])
    assert reader.held_blocks(words(KEYS[:1])) == 1
    made._index[made._index > 0] = 2 * BLOCKS + 1
    assert reader.held_blocks(words(KEYS[:1])) == len(reader.longest_run(KEYS[:1])) == 0


CHANGES = st.tuples(
    st.sampled_from(["publish", "invalidate", "move", "look"]), st.integers(0, BLOCKS - 1), st.integers(1, BLOCKS // 64)
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(known=st.integers(0, BLOCKS), tail=st.integers(0, 40), changes=st.lists(CHANGES, max_size=12))
def test_a_remembered_run_is_believed_only_while_its_blocks_stay(
    table: tuple[TableWriter, TableReader], known: int, tail: int, changes: list[tuple[str, int, int]]
) -> None:
    """Of what `held_blocks` finds, each place that it verifies is held at that moment, and what it does not find is not."""
    made, reader = table
    made.clear()
    made.publish(range(BLOCKS), KEYS)
    chain = np.concatenate([KEYS[:known], OTHERS[:tail]])
    for what, start, count in [("look", 0, 1), ("look", 0, 1), *changes, ("look", 0, 1)]:
        blocks = range(start, min(start + count, BLOCKS))
        if what == "publish":
            made.publish(blocks, KEYS[blocks.start : blocks.stop])
        elif what == "invalidate":
            made.invalidate(blocks)
        elif what == "move":  # what lay there is given to others, and is computed again elsewhere
            made.publish(blocks, OTHERS[blocks.start : blocks.stop])
            elsewhere = range(BLOCKS + start, BLOCKS + blocks.stop)
            made.publish(elsewhere, KEYS[blocks.start : blocks.stop])
        exact, found = len(reader.longest_run(chain)), reader.held_blocks(words(chain), known)
        assert found >= exact
        if found > exact:  # a gap went unseen: it lies between the places
            assert not len(reader.longest_run(chain[exact : exact + 1]))
            assert found >= 32
            assert len(reader.longest_run(chain[found - 1 : found])) == 1


def test_a_remembered_run_of_which_one_verified_block_changed_is_looked_up_anew(table: tuple[TableWriter, TableReader]) -> None:
    made, reader = table
    made.publish(range(BLOCKS), KEYS)
    for _ in range(3):
        assert reader.held_blocks(words(KEYS), 64) == BLOCKS
    made.invalidate([63])
    assert reader.held_blocks(words(KEYS[:70]), 64) == 63
    made.publish([63], OTHERS[:1])
    assert reader.held_blocks(words(KEYS[:64]), 64) == 63
    made.publish([BLOCKS], KEYS[63:64])
    for _ in range(3):
        assert reader.held_blocks(words(KEYS[:70]), 64) == 70


def test_a_remembered_run_is_seen_in_full_when_it_has_few_blocks(table: tuple[TableWriter, TableReader]) -> None:
    made, reader = table
    for gap in range(64):
        made.clear()
        made.publish(range(64), KEYS[:64])
        for _ in range(3):
            assert reader.held_blocks(words(KEYS[:64]), 64) == 64
        made.invalidate([gap])
        made.publish([gap], OTHERS[:1])
        assert reader.held_blocks(words(KEYS[:64]), 64) == gap


def test_no_more_runs_are_remembered_than_the_bound(
    table: tuple[TableWriter, TableReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, reader = table
    monkeypatch.setattr("transport.table.reader._KNOWN_RUNS_MAX", 4)
    made.publish(range(BLOCKS), KEYS)
    for known in range(40, 60):
        for _ in range(2):
            assert reader.held_blocks(words(KEYS), known) == BLOCKS
        assert len(reader._known) <= 4
