"""The count of prefixes."""

from collections import OrderedDict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gateway.block_registry.chain import Chain
from gateway.planner.prefix_counts import _DEPTHS, DEPTHS_MAX, PrefixCounts
from gateway.stats.view import prefix_report
from transport.keys import chain_keys

SIZE = 4


def counted_depths(blocks: int) -> list[int]:
    """The depths up to `blocks` at which a prompt is counted."""
    return [depth for depth in _DEPTHS if depth <= blocks]


def chain_of(*blocks: int) -> Chain:
    return Chain.of(chain_keys(b"root" * 4, [token for block in blocks for token in [block] * SIZE], SIZE))


def top(counts: PrefixCounts, count: int = 10) -> list[tuple[int, int]]:
    return [(tokens, requests) for _, tokens, requests, _ in counts.top(count)]


def test_a_prefix_whose_extension_was_asked_for_as_often_is_left_out() -> None:
    counts = PrefixCounts(100)
    for _ in range(3):
        counts.note(chain_of(1, 2), SIZE, 1.0)
    assert top(counts) == [(2 * SIZE, 3)]


def test_a_common_prefix_is_shown_beside_its_extensions() -> None:
    counts = PrefixCounts(100)
    counts.note(chain_of(1, 2, 3), SIZE, 1.0)
    counts.note(chain_of(1, 2, 4), SIZE, 2.0)
    counts.note(chain_of(1, 2, 4), SIZE, 3.0)
    assert top(counts) == [(2 * SIZE, 3), (3 * SIZE, 2), (3 * SIZE, 1)]
    assert [last_used for *_, last_used in counts.top(10)] == [3.0, 3.0, 1.0]


def test_no_more_blocks_are_kept_than_the_bound_and_recent_ones_stay() -> None:
    counts = PrefixCounts(4)
    counts.note(chain_of(1, 2), SIZE, 1.0)
    counts.note(chain_of(3, 4), SIZE, 2.0)
    counts.note(chain_of(1, 2), SIZE, 3.0)
    counts.note(chain_of(5), SIZE, 4.0)
    assert len(counts) == 4
    assert top(counts) == [(2 * SIZE, 2), (SIZE, 1), (SIZE, 1)]


def test_of_a_prompt_longer_than_the_bound_the_front_is_kept() -> None:
    counts = PrefixCounts(3)
    counts.note(chain_of(1, 2, 3, 4, 5), SIZE, 1.0)
    assert top(counts) == [(3 * SIZE, 1)]


def test_a_long_prompt_is_counted_at_a_few_depths_that_longer_ones_share() -> None:
    depths = counted_depths(8192)
    assert depths[:17] == [*range(1, 17), 18]
    assert len(depths) < 80
    assert depths[-1] > 8192 * 8 / 9
    assert counted_depths(1000) == [depth for depth in depths if depth <= 1000]
    assert len(counted_depths(1 << 40)) == DEPTHS_MAX
    counts = PrefixCounts(1000)
    counts.note(chain_of(*range(50)), SIZE, 1.0)
    counts.note(chain_of(*range(40), *range(100, 110)), SIZE, 2.0)
    assert top(counts, 1) == [(37 * SIZE, 2)]


def test_a_prompt_without_a_full_block_counts_nothing() -> None:
    counts = PrefixCounts(3)
    counts.note(chain_of(), SIZE, 1.0)
    assert len(counts) == 0
    assert prefix_report(counts, 5, lambda keys: [], []).prefixes == []


def test_the_report_names_the_holders_and_carries_no_tokens() -> None:
    counts = PrefixCounts(10)
    counts.note(chain_of(1, 2), SIZE, 5.0)
    report = prefix_report(counts, 1, lambda keys: [["a", "b"] for _ in keys], [])
    assert report.model_dump() == {
        "tracked_blocks": 2,
        "tracked_blocks_max": 10,
        "prefixes": [
            {
                "key": chain_of(1, 2).keys[1].tobytes().hex(),
                "tokens": 2 * SIZE,
                "requests": 1,
                "last_used": 5.0,
                "holders": ["a", "b"],
            }
        ],
        "kept": [],
    }


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=30))
def test_the_most_requested_prefix_is_counted_exactly_while_nothing_is_forgotten(prompts: list[list[int]]) -> None:
    counts = PrefixCounts(10_000)
    for prompt in prompts:
        counts.note(chain_of(*prompt), SIZE, 0.0)
    expected = max((sum(prompt[:1] == [first] for prompt in prompts) for first in range(3)), default=0)
    found = counts.top(1)
    assert (found[0][2] if found else 0) == expected
    assert np.all([len(key) == 16 for key, *_ in counts.top(100)])


PATHS = st.lists(st.integers(0, 2), max_size=24)


@given(st.lists(st.tuples(PATHS, st.integers(0, 24), PATHS), max_size=40), st.sampled_from([1, 2, 5, 20, 50]))
def test_counting_at_the_last_key_tells_what_counting_at_each_key_would(
    prompts: list[tuple[list[int], int, list[int]]], blocks_max: int
) -> None:
    counts = PrefixCounts(blocks_max)
    each: OrderedDict[bytes, tuple[int, int, float, bytes]] = OrderedDict()
    last: list[int] = []
    for now, (fresh, kept, more) in enumerate(prompts):
        last = last[:kept] + more if kept else fresh
        chain = chain_of(*last)
        counts.note(chain, SIZE, now)
        keys = [chain.raw[16 * depth - 16 : 16 * depth] for depth in counted_depths(len(last))[:blocks_max]]
        for place in range(len(keys) - 1, -1, -1):  # the front of a prefix is the last to be forgotten
            requests = each[keys[place]][1] if keys[place] in each else 0
            parent = keys[place - 1] if place else b""
            each[keys[place]] = (counted_depths(len(last))[place] * SIZE, requests + 1, now, parent)
            each.move_to_end(keys[place])
        while len(each) > blocks_max:
            each.popitem(last=False)
        longest: dict[bytes, int] = {}
        for _, requests, _, parent in each.values():
            longest[parent] = max(requests, longest.get(parent, 0))
        told = {(key, *entry[:3]) for key, entry in each.items() if entry[1] > longest.get(key, 0)}
        assert set(counts.top(blocks_max)) == told
        assert len(counts) == len(each)
