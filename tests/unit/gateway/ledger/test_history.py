"""Which tenants' prompts began alike."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.ledger.history import LENGTHS, SeenPrefixes

LONG = list(range(1000))


def test_lengths_grow_by_at_most_a_quarter_beyond_the_first_ones() -> None:
    assert all(after > before for before, after in pairwise(LENGTHS))
    assert all(after <= before * 1.25 for before, after in pairwise(LENGTHS[4:]))


def test_a_prompt_that_goes_on_from_an_earlier_one_is_recognised() -> None:
    seen = SeenPrefixes(1000)
    seen.note(seen.digests(LONG), "one", 1.0)
    longer = seen.digests(LONG + [7] * 1000)
    own, others = seen.longest(longer, "one", 2.0)
    assert 750 < own <= 1000
    assert others == {}
    assert seen.longest(longer, "two", 2.0) == (0, {"one": own})


def test_a_prompt_that_begins_otherwise_is_not() -> None:
    seen = SeenPrefixes(1000)
    seen.note(seen.digests(LONG), "one", 1.0)
    assert seen.longest(seen.digests([1, *LONG[1:]]), "one", 2.0) == (0, {})
    assert seen.longest(seen.digests(LONG, "adapter"), "one", 2.0) == (0, {})


def test_what_was_computed_after_a_request_was_sent_says_nothing_about_it() -> None:
    seen = SeenPrefixes(1000)
    digests = seen.digests(LONG)
    seen.note(digests, "one", 5.0)
    assert seen.longest(digests, "one", 4.9) == (0, {})
    seen.note(digests, "one", 9.0)
    assert seen.longest(digests, "one", 6.0)[0] > 0


def test_memory_is_bounded_in_prefixes_and_in_tenants_of_one() -> None:
    seen = SeenPrefixes(20)
    for tenant in range(10):
        seen.note(seen.digests(LONG), f"t{tenant}", 1.0)
    assert len(seen) == len(seen.digests(LONG))
    assert set(seen.longest(seen.digests(LONG), "me", 2.0)[1]) == {"t6", "t7", "t8", "t9"}
    for start in range(50):
        seen.note(seen.digests([start + 5000, *LONG]), "one", 1.0)
    assert len(seen) == 20


def test_the_front_of_a_prompt_is_forgotten_last() -> None:
    seen = SeenPrefixes(5)
    digests = seen.digests(LONG)
    seen.note(digests, "one", 1.0)
    assert seen.longest(digests, "one", 2.0)[0] == LENGTHS[4]


def test_two_processes_do_not_know_each_others_digests() -> None:
    assert SeenPrefixes(1).digests(LONG) != SeenPrefixes(1).digests(LONG)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=200), st.lists(st.integers(0, 2**31 - 1), max_size=200))
def test_equal_digests_mean_equal_beginnings(one: list[int], two: list[int]) -> None:
    seen = SeenPrefixes(1, secret=1)
    for length, ours, theirs in zip(LENGTHS, seen.digests(one), seen.digests(two), strict=False):
        assert (ours == theirs) == (one[:length] == two[:length])


def test_only_what_is_longer_than_asked_for_is_told() -> None:
    seen = SeenPrefixes(20)
    for tenant, tokens in (("one", 200), ("two", 64), ("three", 2000)):
        seen.note(seen.digests(LONG[:tokens]), tenant, 1.0)
    own, others = seen.longest(seen.digests(LONG), "one", 2.0)
    for more_than in (0, 15, 16, 64, own - 1, own, own + 1, 2000, 1 << 30):
        rest = {name: length for name, length in others.items() if length > more_than}
        assert seen.longest(seen.digests(LONG), "one", 2.0, more_than) == (own if own > more_than else 0, rest)
