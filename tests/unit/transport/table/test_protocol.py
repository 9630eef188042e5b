"""The peer read under every interleaving that hypothesis can think of: nothing wrong is ever accepted.

A writer's program is run once to record each single store it makes, to states, keys, index and to the blocks' memory.
The stores are then replayed one by one between the single loads of readers that look up a chain, copy its blocks cell by
cell and check.
"""

from contextlib import closing
from dataclasses import dataclass

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.transport.recorded_stores import RecordedStores
from tests.unit.transport.table_fixtures import writer
from transport.keys import chain_keys, root_key
from transport.table.reader import TableReader

BLOCKS, CELLS, CHAIN, READERS = 3, 3, 4, 3
KEYS = chain_keys(root_key(b"f" * 16), range(CHAIN * 4), 4)


class Interleaved:
    """An array that lets the writer go on for some stores before each load."""

    def __init__(self, array, advance):
        self.array, self.advance = array, advance

    def __getitem__(self, place):
        self.advance()
        return self.array[place].copy()

    def take(self, places, axis=None):
        self.advance()
        return self.array.take(places, axis=axis)


@dataclass
class Case:
    program: list[tuple[int, int]]
    """(block, key): the block is withdrawn, overwritten cell by cell and offered under the key."""
    pace: list[int]
    """How many stores happen before each load, over and over."""


CASES = st.builds(
    Case,
    st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, CHAIN - 1)), min_size=1, max_size=8),
    st.lists(st.integers(0, 12), min_size=1, max_size=16),
)


def wrong_reads(path, case: Case, *, checked: bool) -> tuple[int, int]:
    """Return (accepted blocks whose bytes are not those of their key, accepted blocks)."""
    memory = np.full((BLOCKS, CELLS), -1)
    stores: list = []
    with closing(writer(path, blocks=BLOCKS)) as table, closing(TableReader(table.path)) as reader:
        table._states = RecordedStores(table._states, stores)
        table._keys = RecordedStores(table._keys, stores)
        table._index = RecordedStores(table._index, stores)
        for block, key in case.program:
            table.invalidate([block])
            stores.extend((memory, (block, cell), key) for cell in range(CELLS))
            table.publish([block], KEYS[key : key + 1])
        turn = 0

        def advance():
            nonlocal turn
            for _ in range(case.pace[turn % len(case.pace)]):
                if stores:
                    array, place, value = stores.pop(0)
                    array[place] = value
            turn += 1

        for name in ("_states", "_keys", "_index"):
            setattr(reader, name, Interleaved(getattr(reader, name), advance))
        source = Interleaved(memory, advance)
        wrong = accepted = 0
        for attempt in range(READERS):
            first = attempt % CHAIN
            run = reader.longest_run(KEYS[first:])
            copies = [[int(source[block, cell]) for cell in range(CELLS)] for block in run.block_ids.tolist()]
            good = reader.unchanged(run.block_ids, run.states) if checked else np.ones(len(run), bool)
            accepted += int(good.sum())
            wrong += sum(copy != [first + i] * CELLS for i, copy in enumerate(copies) if good[i])
        table._states = np.ones(BLOCKS, np.uint64)  # nothing left to withdraw at close
    return wrong, accepted


@given(CASES)
@settings(max_examples=400, deadline=None)
def test_no_interleaving_lets_a_wrong_block_be_accepted(tmp_path_factory, case):
    wrong, _ = wrong_reads(tmp_path_factory.mktemp("t"), case, checked=True)
    assert wrong == 0


@pytest.mark.parametrize("checked", [True, False])
def test_without_the_check_after_the_copy_a_wrong_block_is_accepted(tmp_path_factory, checked):
    def found() -> Case:
        return hypothesis.find(
            CASES,
            lambda case: wrong_reads(tmp_path_factory.mktemp("t"), case, checked=checked)[0] > 0,
            settings=settings(max_examples=1500, deadline=None, database=None),
        )

    if checked:
        with pytest.raises(hypothesis.errors.NoSuchExample):
            found()
    else:
        assert found().program


def test_an_undisturbed_reader_accepts_what_it_copied(tmp_path):
    case = Case([(0, 0), (1, 1), (2, 2)], [1000])
    assert wrong_reads(tmp_path, case, checked=True) == (0, 3 + 2 + 1)
