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


def test_an_index_that_points_outside_of_the_table_is_a_miss(table: tuple[TableWriter, TableReader]) -> None:
    made, reader = table
    made.publish([0], KEYS[:1])
    assert reader.held_blocks(words(KEYS[:1])) == 1
    made._index[made._index > 0] = 2 * BLOCKS + 1
    assert reader.held_blocks(words(KEYS[:1])) == len(reader.longest_run(KEYS[:1])) == 0
