"""What a table of several groups supplies: the rule of `transport.groups` over real tables, for steering and for imports."""

import itertools
from contextlib import closing

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.transport.table_fixtures import writer
from transport.groups import Group, needed, step, supplied, unit
from transport.keys import chain_keys, group_keys, root_key
from transport.table import group_look_up
from transport.table.group_look_up import GroupChain, held_tokens, supply
from transport.table.reader import TableReader

UNITS = 60
KEYS = chain_keys(root_key(b"f" * 16), range(UNITS), 1)
MODELS = [
    [Group("full", 1), Group("window", 1, 5)],
    [Group("full", 1), Group("window", 2, 9), Group("window", 2, 9)],
    [Group("full", 2), Group("full", 2), Group("state", 4)],
    [Group("full", 3), Group("chunk", 3, 12)],
]


class Held:
    def __init__(self, blocks):
        self.blocks = blocks

    def run_end(self, group, begin, end):
        return next((block for block in range(begin, end) if block not in self.blocks[group]), end)

    def last_missing(self, group, begin, end):
        return max((block for block in range(begin, end) if block not in self.blocks[group]), default=-1)

    def last_held(self, group, begin, end):
        return max((block for block in range(begin, end) if block in self.blocks[group]), default=-1)


@pytest.fixture
def table(tmp_path):
    made = writer(tmp_path, blocks=4 * UNITS, block_size=1)
    with closing(made), closing(TableReader(made.path)) as reader:
        yield made, reader


def publish(made, groups, held):
    """Offer these blocks; returns the id of each."""
    made.clear()
    ids, free = {}, iter(range(1, 4 * UNITS))
    for number, group in enumerate(groups):
        keys = group_keys(KEYS, number, group.block_size // unit(groups))
        for block in sorted(held[number]):
            ids[number, block] = next(free)
            made.publish([ids[number, block]], keys[block : block + 1])
    return ids


def blocks_of(draw, groups):
    held = []
    for group in groups:
        every = range(UNITS * unit(groups) // group.block_size)
        held.append(set(every) - draw(st.sets(st.sampled_from(every), max_size=draw(st.sampled_from([0, 2, len(every)])))))
    return held


@pytest.mark.parametrize("groups", MODELS, ids=str)
@pytest.mark.parametrize("chunk", [4, 256])
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_both_ways_find_what_the_rule_says(table, groups, chunk, data):
    made, reader = table
    held = blocks_of(data.draw, groups)
    ids = publish(made, groups, held)
    chain = GroupChain(groups, KEYS)
    begin = data.draw(st.integers(0, 5)) * step(groups)
    end = data.draw(st.integers(begin, chain.tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_look_up, "_CHUNK_BLOCKS", chunk)
        found = supply(reader, chain, begin, end)
    wanted = supplied(groups, Held(held), begin, end)
    assert (found.tokens if found else begin) == wanted
    if found:
        expected = [[ids[number, block] for block in needed(group, begin, wanted)] for number, group in enumerate(groups)]
        assert found.counts == tuple(map(len, expected))
        assert found.block_ids.tolist() == list(itertools.chain.from_iterable(expected))
        assert reader.unchanged(found.block_ids, found.states).all()
    # halving may overlook a gap in what is held of full attention
    assert held_tokens(reader, chain) >= supplied(groups, Held(held), 0, chain.tokens)


class Counted:
    """A table that counts what is asked of it."""

    def __init__(self, table):
        self.table, self.asked = table, 0

    def __getattr__(self, name):
        self.asked += 1
        return getattr(self.table, name)


@pytest.mark.parametrize("count", [lambda t, c: held_tokens(t, c), lambda t, c: supply(t, c, 0, c.tokens).tokens])
def test_a_long_prefix_of_which_windows_and_states_hold_little_takes_few_look_ups(tmp_path, count):
    blocks = 2048
    groups = [Group("full", 16), *[Group("window", 16, 512)] * 5, Group("state", 16)]
    keys = chain_keys(root_key(b"f" * 16), range(blocks * 16), 16)
    with closing(writer(tmp_path, blocks=blocks + 64, block_size=16)) as made, closing(TableReader(made.path)) as reader:
        made.publish(range(1, blocks + 1), keys)
        for number in range(1, 7):
            made.publish(range(blocks + 4 * number, blocks + 4 * number + 3), group_keys(keys, number)[:3])
        table = Counted(reader)
        assert count(table, GroupChain(groups, keys)) == 3 * 16
        assert table.asked < 32  # `supply` looks full attention up in eight parts


def test_a_block_of_one_group_is_not_taken_for_another_groups(table):
    made, reader = table
    groups = [Group("full", 1), Group("window", 1, 3), Group("window", 1, 3)]
    made.publish(range(1, 6), KEYS[:5])
    made.publish(range(11, 16), group_keys(KEYS[:5], 1))
    assert supply(reader, GroupChain(groups, KEYS), 0, 5) is None
    made.publish(range(21, 26), group_keys(KEYS[:5], 2))
    found = supply(reader, GroupChain(groups, KEYS), 0, 5)
    assert found.counts == (5, 2, 2)
    assert found.block_ids.tolist() == [1, 2, 3, 4, 5, 14, 15, 24, 25]
    made.invalidate([25])
    assert supply(reader, GroupChain(groups, KEYS), 0, 5).tokens == 4
    assert held_tokens(reader, GroupChain(groups, KEYS)) == 4


def test_masks_differ_and_the_first_groups_keys_are_the_chains_own():
    assert group_keys(KEYS, 0) is KEYS
    masked = [group_keys(KEYS, number).tobytes() for number in range(64)]
    assert len(set(masked)) == 64
    assert np.array_equal(group_keys(KEYS, 3, 2), group_keys(KEYS, 3)[1::2])
