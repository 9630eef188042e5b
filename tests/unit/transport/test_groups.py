"""How much of a prefix a holder can supply: against every length tried one by one, and against vLLM's own prefix cache."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_coordinator import get_kv_cache_coordinator
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id, resolve_block_hashes
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from transport.groups import Group, import_bytes, needed, step, supplied, unit

UNITS = 24
"""Keys of the longest chain that is tried."""


class Held:
    """Sets of blocks, one a group."""

    def __init__(self, blocks: list[set[int]]) -> None:
        self.blocks = blocks

    def run_end(self, group: int, begin: int, end: int) -> int:
        return next((block for block in range(begin, end) if block not in self.blocks[group]), end)

    def last_missing(self, group: int, begin: int, end: int) -> int:
        return max((block for block in range(begin, end) if block not in self.blocks[group]), default=-1)

    def last_held(self, group: int, begin: int, end: int) -> int:
        return max((block for block in range(begin, end) if block in self.blocks[group]), default=-1)


def reads(group: Group, tokens: int) -> set[int]:
    """The blocks that hold a token which the token behind `tokens` sees, each position asked on its own."""
    sees = {
        "full": lambda place: True,
        "window": lambda place: tokens - place < group.window,
        "chunk": lambda place: place // group.window == tokens // group.window,
        "state": lambda place: place == tokens - 1,
    }[group.kind]
    return {place // group.block_size for place in range(tokens) if sees(place)}


def tried(groups: list[Group], held: Held, begin: int, end: int) -> int:
    """The longest length at which everything that is read there is held or lies in the prefix that one has."""
    best = begin
    for length in range(begin, end + 1, step(groups)):
        if length > begin and all(
            block in held.blocks[number] or (block + 1) * group.block_size <= begin
            for number, group in enumerate(groups)
            for block in reads(group, length)
        ):
            best = length
    return best


def test_the_bytes_of_an_import_are_those_of_its_windows_and_states_and_those_of_each_token():
    groups = [Group("full", 16, 0, 2, 3200), Group("window", 16, 128, 2, 500), Group("state", 64, 0, 1, 9000)]
    assert import_bytes(groups) == (8 * 500 + 9000, 200.0)
    assert import_bytes([]) == (0.0, 0.0)
    long = sum(len(needed(group, 0, 6400)) * group.bytes for group in groups)
    assert long == 8 * 500 + 9000 + 6400 * 200


class Asked(Held):
    """Counts how often it is asked."""

    asked = 0

    def last_missing(self, group: int, begin: int, end: int) -> int:
        self.asked += 1
        return super().last_missing(group, begin, end)


@pytest.mark.parametrize(
    ("other", "held", "found"),
    [
        (Group("window", 4, 40), range(12), 48),
        (Group("window", 4, 40), (), 0),
        (Group("state", 4), (2,), 12),
        (Group("chunk", 4, 400), range(3), 3600),  # where a chunk begins it takes nothing of it
        (Group("chunk", 4, 8000), range(3), 12),
    ],
    ids=str,
)
def test_a_long_prefix_of_which_a_group_holds_little_is_found_in_a_few_tries(other, held, found):
    holder = Asked([set(range(1000)), set(held), set(held)])
    assert supplied([Group("full", 4), other, other], holder, 0, 3999) == found
    assert holder.asked <= 8


def test_a_holder_of_every_other_block_is_given_up():
    groups = [Group("full", 1), Group("window", 1, 3)]
    held = {0, 1, *range(3, 5000, 2)}
    assert supplied(groups, Held([set(range(5000)), held]), 0, 400) == 2
    holder = Asked([set(range(5000)), held])
    assert supplied(groups, holder, 0, 5000) == 0
    assert holder.asked < 1000


KINDS = st.sampled_from(["full", "window", "chunk", "state"])


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Group], Held]:
    sizes = draw(st.sampled_from([(2,), (2, 4), (4, 6), (3,)]))
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        kind, size = draw(KINDS), draw(st.sampled_from(sizes))
        window = {"window": draw(st.integers(1, 20)), "chunk": size * draw(st.integers(1, 5))}.get(kind, 0)
        groups.append(Group(kind, size, window))
    tokens = UNITS * unit(groups)
    dense = draw(st.booleans())
    held = []
    for group in groups:
        every = set(range(tokens // group.block_size))
        some = draw(st.sets(st.integers(0, max(every))))
        held.append(every - set(itertools.islice(some, 3)) if dense else some)
    return groups, Held(held)


@settings(max_examples=400, deadline=None)
@given(models(), st.integers(0, 6), st.integers(0, UNITS * 3))
def test_what_is_supplied_is_the_longest_length_at_which_every_group_has_what_is_read(model, steps, end):
    groups, held = model
    begin = steps * step(groups)
    if any(group.kind != "state" for group in groups):  # one has what is read at `begin`: that is what a local prefix is
        for number, group in enumerate(groups):
            held.blocks[number] |= reads(group, begin) if group.kind != "state" else set()
    assert supplied(groups, held, begin, max(begin, end)) == tried(groups, held, begin, max(begin, end))


@settings(max_examples=300, deadline=None)
@given(models(), st.integers(1, UNITS))
def test_what_is_needed_is_what_is_read_and_lies_behind_the_prefix(model, steps):
    groups, _ = model
    for group in groups:
        end = steps * step(groups)
        assert set(needed(group, 0, end)) == reads(group, end)
        assert set(needed(group, step(groups), end)) == {
            block for block in reads(group, end) if block * group.block_size >= step(groups)
        }


def spec_of(group: Group):
    about = {"block_size": group.block_size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    if group.kind == "full":
        return FullAttentionSpec(**about)
    if group.kind == "window":
        return SlidingWindowSpec(**about, sliding_window=group.window)
    if group.kind == "chunk":
        return ChunkedLocalAttentionSpec(**about, attention_chunk_size=group.window)
    return MambaSpec(block_size=group.block_size, shapes=((4,),), dtypes=(torch.float32,), mamba_cache_mode="align")


FULL, STATE = Group("full", 4), Group("state", 4)
MODELS = [
    [FULL, Group("window", 4, 10)],
    [FULL, Group("window", 4, 8), Group("window", 4, 8)],
    [FULL, Group("window", 4, 5), Group("window", 4, 13)],
    [FULL, Group("window", 2, 7)],
    [Group("full", 2), Group("window", 4, 9)],
    [FULL, Group("chunk", 4, 16)],
    [FULL, Group("chunk", 4, 8), Group("chunk", 4, 8)],
    [FULL, STATE],
    [FULL, STATE, STATE, STATE],
    [FULL, FULL, STATE, Group("window", 4, 6)],
    [Group("window", 4, 9), Group("window", 4, 5)],
]


def vllms_hit(groups: list[Group], held: Held, tokens: int) -> int:
    """How long a prefix of `tokens` tokens is that vLLM finds in a cache with these blocks."""
    blocks = 1 + sum(map(len, held.blocks))
    config = KVCacheConfig(blocks, [], [KVCacheGroupSpec([f"layer.{n}"], spec_of(group)) for n, group in enumerate(groups)])
    coordinator = get_kv_cache_coordinator(
        config, 4096, 4096, False, True, False, 1, 1, scheduler_block_size=step(groups), hash_block_size=unit(groups)
    )
    hashes = [BlockHash(place.to_bytes(32, "little")) for place in range(UNITS)]
    free = iter(coordinator.block_pool.get_new_blocks(blocks - 1))
    for number, group in enumerate(groups):
        own = resolve_block_hashes(hashes, unit(groups), group.block_size)
        for block in held.blocks[number]:
            name = make_block_hash_with_group_id(own[block], number)
            coordinator.block_pool._insert_block_hash(name, next(free), num_tokens=(block + 1) * group.block_size)
    return int(coordinator.find_longest_cache_hit(hashes, tokens)[1])


@pytest.mark.parametrize("groups", MODELS, ids=str)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_it_is_what_vllm_finds_in_its_own_cache(groups, data):
    tokens = UNITS * unit(groups)
    held = []
    for group in groups:
        every = set(range(tokens // group.block_size))
        gaps = data.draw(st.sets(st.sampled_from(sorted(every)), max_size=data.draw(st.sampled_from([2, len(every)]))))
        held.append(every - gaps)
    end = data.draw(st.integers(0, tokens))
    assert supplied(groups, Held(held), 0, end) == vllms_hit(groups, Held(held), end)
