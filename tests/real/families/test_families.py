"""Families of KV caches in real engines on the CPU: sliding windows (gemma3, gptoss), state layers (qwen3next).

An import is compared with a local prefix hit of the same length, to the last bit.
"""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.gpu.replica import Answer
from tests.real.families.engines import ANSWER_SECONDS_MAX, CHUNK, Family, moving_on, scrambled, tokens
from tests.real.fleet import until

TRIES_MAX = 25
KILLED = ("d", "e", "f")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gemma3": {"block_size": 32},
    "gptoss": {"block_size": 32},
    "qwen3next": {"dtype": "bfloat16"},  # vLLM's kernel for the CPU takes no other
}
"""Windows of 256 and 128 tokens; a block of states is as long as vLLM makes it."""


@pytest.fixture(scope="module", params=list(ARGUMENTS))
def family(request, tmp_path_factory) -> Iterator[Family]:
    made = Family(tmp_path_factory.mktemp(request.param), request.param, **ARGUMENTS[request.param])
    try:
        made.start("a", "b", "c")
        yield made
    finally:
        made.close()


def lengths(family: Family) -> list[int]:
    """One below, at and above the ends of blocks, of windows and of what a step computes."""
    block = family.block()
    with closing(family.table("a")) as table:
        windows = {group.window for group in table.groups if group.window}
    edges = {block, 2 * block, CHUNK, *windows, *(2 * window for window in windows), *(window + block for window in windows)}
    return sorted({length + way for length in edges for way in (-1, 0, 1, 2) if length + way > block})


def test_an_import_is_a_local_hit_to_the_last_bit_around_every_boundary(family):
    block = family.block()
    for length in lengths(family):
        ids, whole = tokens(length, length), (length - 1) // block * block
        cold = family.ask("a", ids)
        with family.counting("b") as counted:
            imported = family.ask("b", ids)
        local, owners = family.ask("b", ids), family.ask("a", ids)
        assert (cold.cached, imported.cached, local.cached, owners.cached) == (0, whole, whole, whole), length
        assert counted["peer_tokens_shared_memory"] == whole, length
        assert imported.same_as(local), length
        assert imported.same_as(owners), length
        assert imported.tokens == cold.tokens, length


def test_what_is_missing_behind_a_local_hit_is_imported(family):
    block = family.block()
    for number, (here, there) in enumerate([(1, 3), (2, 3), (2, 11), (9, 10)] if block < 100 else [(1, 3), (2, 3)]):
        ids = tokens(there * block + 9, 1000 + number)
        family.ask("b", ids[: here * block + 5])
        family.ask("a", ids)
        with family.counting("b") as counted:
            imported = family.ask("b", ids)
        assert (counted["local_tokens"] - 9, counted["peer_tokens_shared_memory"]) == (here * block - 9, (there - here) * block)
        assert imported.same_as(family.ask("b", ids))  # the owner computed the first blocks in a batch of another shape


def test_of_two_holders_of_different_lengths_the_longer_one_supplies(family):
    block = family.block()
    ids = tokens(5 * block + 7, 2000)
    family.ask("a", ids[: 2 * block + 3])
    family.ask("c", ids, source="")
    with family.counting("b") as counted:
        imported = family.ask("b", ids)
    assert counted["peer_tokens_shared_memory"] == 5 * block
    assert imported.same_as(family.ask("c", ids))


def test_another_salt_is_another_cache(family):
    ids, whole = tokens(2 * family.block() + 9, 3000), 2 * family.block()
    cold = family.ask("a", ids, cache_salt="one")
    with family.counting("b") as counted:
        other = family.ask("b", ids, cache_salt="two", source="a")
        none = family.ask("b", ids, source="a")
        own = family.ask("b", ids, cache_salt="one", source="a")
    assert (other.cached, none.cached, own.cached) == (0, 0, whole)
    assert counted["peer_tokens_shared_memory"] == whole
    assert other.tokens == none.tokens == own.tokens == cold.tokens


def test_every_groups_blocks_decide_the_answer_and_a_changed_one_is_computed(family):
    """The control first: noise in a block of any group shows. Then such a block moves on while it is copied."""
    block = family.block()
    whole = 3 * block
    ids = tokens(whole + 9, 4000)
    family.ask("a", ids)
    wanted = family.ask("a", ids)
    found = family.supply("a", ids)
    ends = [sum(found.counts[: number + 1]) for number in range(len(found.counts))]
    with closing(family.table("a")) as table:
        for group, end in enumerate(ends):
            changed = int(found.block_ids[end - 1])
            with scrambled(table, group, changed):
                family["b"].clear()
                misled = family.ask("b", ids, source="a")
            assert misled.cached == whole, group
            assert not misled.same_as(wanted), group
            for _ in range(TRIES_MAX):  # nothing may move for a moment on a busy machine
                family["b"].clear()
                with family.counting("b") as counted, moving_on(table, family.tables / "a.table", changed):
                    answer = family.ask("b", ids, source="a")
                assert answer.tokens == wanted.tokens, group
                assert counted["computed_tokens"] == len(ids) - answer.cached, group
                if answer.cached < whole:
                    break
            assert answer.cached < whole, group
        family["b"].clear()
        assert family.ask("b", ids, source="a").same_as(wanted)


def test_requests_that_are_preempted_are_right_whatever_was_imported(family):
    """An engine with room for two of them is given six prompts of which another one holds the beginnings.

    What is computed again is computed in other batches, so that in bfloat16 an answer of 1,280 tokens may take another turn,
    with imports or without. So each answer is read once more by an engine that has all the room: its tokens must be the best
    ones about as often as those of an answer that was computed without preemption. In float32 the tokens are the same.
    """
    block = family.block()
    prompts = [tokens(2 * block + 9, 5000 + number) for number in range(6)]
    for ids in prompts:
        family.ask("a", ids)
    wanted = family["c"].ask_all(prompts, 2 * block, ANSWER_SECONDS_MAX)
    with closing(family.table("c")) as table:
        size = max(layer.stride for memory in table.memories for layer in memory.layers)
        layers = max(sum(layer.group == group for layer in table.memories[0].layers) for group in range(len(table.groups)))
        blocks = 1 + len(table.groups) * 10
    family.start("small", kv_cache_memory_bytes=blocks * size * layers, max_model_len=5 * block)
    try:
        with family.counting("small") as counted:
            answers = family["small"].ask_all(prompts, 2 * block, ANSWER_SECONDS_MAX)
    finally:
        family["small"].stop()
    assert sum(answer.preempted for answer in answers) > 0
    assert counted["imports"] > 0
    if family.exact:
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in wanted]
        assert len({tuple(answer.tokens) for answer in wanted}) == len(prompts)  # another prompt gives another answer
    for ids, answer, want in zip(prompts, answers, wanted, strict=True):
        assert misses(family, ids, answer) <= misses(family, ids, want) + 0.05


def misses(family: Family, ids: list[int], answer: Answer) -> float:
    """The share of an answer's tokens that are not nearly the best ones behind this prompt."""
    below = family["c"].shortfalls(ids + answer.tokens, len(ids), ANSWER_SECONDS_MAX)
    return sum(each > 0.1 for each in below) / len(below)


def test_owners_that_are_killed_within_copies_are_not_believed(family):
    """The importer's copies take a piece every 50 ms, and its own table tells when one is under way."""
    block = family.block()
    ids = tokens(3 * block + 9, 7000)
    wanted = family.ask("c", ids, source="")
    family.start_slowed("slow")
    family.start(*KILLED)
    for owner in KILLED:
        family.ask(owner, ids, source="")
    landed = 0
    for owner in KILLED:
        with family.counting("slow") as counted, closing(family.table("slow")) as table:
            family["slow"].begin(ids, 8, logprobs=True, source=owner)
            until(lambda told=table: told.load().imports_under_way > 0, ANSWER_SECONDS_MAX, "a copy is under way", 0.001)
            family.kill(owner)
            answer = family["slow"].end(ANSWER_SECONDS_MAX)
        assert answer.tokens == wanted.tokens, owner
        assert counted["computed_tokens"] == len(ids) - answer.cached, owner
        assert answer.cached == (0 if counted["fallbacks"] else 3 * block), owner  # of several groups all or nothing
        landed += counted["fallbacks"]
        family["slow"].clear()
    assert landed > 0
    family.ask("a", ids)
    assert family.ask("slow", ids, source="a").cached == 3 * block  # the importer lives, and believes who lives


def test_an_owner_that_is_killed_is_not_believed(family):
    """The last one here: it kills an engine."""
    ids, others = tokens(3 * family.block() + 9, 6000), tokens(3 * family.block() + 9, 6001)
    wanted, other = family.ask("a", ids), family.ask("a", others)
    table = family.table("a")
    family["b"].begin(ids, 8, logprobs=True, source="a")
    family.kill("a")
    assert family["b"].end(ANSWER_SECONDS_MAX).tokens == wanted.tokens
    assert family.ask("b", others, source="a").tokens == other.tokens
    assert not table.alive()
    table.close()
