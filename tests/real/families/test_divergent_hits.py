"""Full attention that reaches further here than any state does: an import begins there and brings the state that is missing."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.real.families.engines import Family, moving_on, tokens
from transport.keys import chain_keys, root_key
from transport.table.group_look_up import GroupChain, supply

TRIES_MAX = 25
SHARED, WHOLE = 2, 4
"""Blocks: of two prompts, those that are the same, and those of one that are full."""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Iterator[Family]:
    made = Family(tmp_path_factory.mktemp("hybrid"), "qwen3next", dtype="bfloat16")
    try:
        made.start("a", "b")
        yield made
    finally:
        made.close()


def held(family: Family, name: str, ids: list[int]) -> list[list[bool]]:
    """Which blocks of a prompt an engine's table has on offer, group by group."""
    with closing(family.table(name)) as table:
        chain = GroupChain(table.groups, chain_keys(root_key(table.fingerprint), ids, table.block_size, table.hash_name))
        return [table.look_up(chain.keys(group))[0].tolist() for group in range(len(table.groups))]


def diverge(family: Family, seed: int) -> list[int]:
    """Return a prompt of which b has full attention to the end of SHARED blocks, a state one block before that at best, and a
    the state at its end."""
    block = family.block()
    ids, others = tokens(WHOLE * block + 9, seed), tokens(WHOLE * block + 9, seed + 1)
    family.ask("b", ids[: (SHARED - 1) * block + 9], source="")
    family.ask("b", ids[: SHARED * block] + others[: block + 9], source="")
    family.ask("a", ids, source="")
    full, *states = held(family, "b", ids)
    assert full == [True] * SHARED + [False] * (WHOLE - SHARED)
    assert states
    assert all(state == [True] * (SHARED - 1) + [False] * (WHOLE - SHARED + 1) for state in states)
    full, *states = held(family, "a", ids)
    assert all(full)
    assert all(state[-1] for state in states)
    return ids


def test_an_import_begins_where_full_attention_ends_here_and_is_a_local_hit_to_the_last_bit(hybrid):
    block = hybrid.block()
    ids = diverge(hybrid, 1)
    with hybrid.counting("b") as counted:
        imported = hybrid.ask("b", ids)
    assert (counted["local_tokens"], counted["peer_tokens_shared_memory"]) == (SHARED * block, (WHOLE - SHARED) * block)
    assert (imported.cached, counted["fallbacks"]) == (WHOLE * block, 0)
    with hybrid.counting("b") as counted:
        local = hybrid.ask("b", ids)
    assert (counted["local_tokens"], counted["imports"]) == (WHOLE * block, 0)
    assert imported.same_as(local)


@pytest.mark.parametrize("group", [0, 1], ids=["full attention", "state"])
def test_one_whose_check_fails_is_computed_from_the_state_that_is_here(hybrid, group):
    """What full attention has here beyond that state is of no use then: the state that fits it never came."""
    block = hybrid.block()
    for number in range(TRIES_MAX):  # nothing may move for a moment on a busy machine
        ids = diverge(hybrid, 100 * (group + 1) + 2 * number)
        wanted = hybrid.ask("a", ids)
        with closing(hybrid.table("a")) as table:
            keys = chain_keys(root_key(table.fingerprint), ids, table.block_size, table.hash_name)
            found = supply(table, GroupChain(table.groups, keys), SHARED * block, WHOLE * block)
            assert found is not None
            assert found.counts[0] == WHOLE - SHARED
            size = sum(layer.bytes * found.counts[layer.group] for layer in table.memories[0].layers)
            changed = int(found.block_ids[sum(found.counts[: group + 1]) - 1])
            with hybrid.counting("b") as counted, moving_on(table, hybrid.tables / "a.table", changed):
                answer = hybrid.ask("b", ids)
        assert answer.tokens == wanted.tokens
        if counted["fallbacks"]:
            break
    assert (counted["fallbacks"], counted["import_bytes"]) == (1, size)  # it did begin where full attention ends here
    assert (counted["check_failures"] > 0, counted["peer_tokens_shared_memory"]) == (True, 0)
    assert answer.cached == (SHARED - 1) * block
    assert counted["computed_tokens"] == len(ids) - answer.cached
    assert hybrid.ask("b", ids).tokens == wanted.tokens  # and the engine lives
