"""What it costs that caches give up blocks: what is learnt, and what becomes of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.steering.evictions import AGE_MAX, BELIEF, NOTHING_AGAIN, SOONER, Evictions

CACHE = 10_000
FLEET = {"a": CACHE, "b": CACHE}


def evictions() -> Evictions:
    made = Evictions()
    made.caches(FLEET)
    return made


def settled(lost_share: float, turnovers: int = 10, seconds: float = 100.0) -> Evictions:
    """Caches that turn over in `seconds`, and that share of what they give up is asked for again."""
    made = evictions()
    for step in range(100 * turnovers):
        made.gave_up("ab"[step % 2], 1, (step // 2 + 1) * CACHE // 50, step * seconds / 100)
        made.missed(int(lost_share * CACHE / 50), 1000)
    return made


def test_without_caches_nothing_costs_anything() -> None:
    assert Evictions().again() == NOTHING_AGAIN
    gone = settled(1.0)
    gone.caches({})
    assert gone.again() == NOTHING_AGAIN


def test_before_anything_was_seen_all_is_believed_to_be_lost() -> None:
    assert evictions().again().tokens == 1.0


@pytest.mark.parametrize(("lost_share", "again"), [(0.0, 0.0), (0.1, 0.1 * SOONER), (0.2, 0.2 * SOONER), (0.9, 1.0)])
def test_what_is_asked_for_again_is_learnt(lost_share: float, again: float) -> None:
    assert settled(lost_share).again().tokens == pytest.approx(again, abs=BELIEF)


def test_what_was_lost_long_ago_counts_no_more() -> None:
    made = settled(1.0)
    for step in range(1001, 2001):
        made.gave_up("a", 1, step * CACHE // 50, 2000.0 + step)
    assert made.again().tokens < 0.1


def test_what_was_given_up_before_anybody_looked_counts_nothing() -> None:
    made = evictions()
    made.gave_up("a", 1, 1000 * CACHE, 1.0)
    made.gave_up("b", 1, 1000 * CACHE, 1.0)
    assert made.again().tokens == 1.0
    assert made.counts_since(2.0) == float("-inf")


def test_time_does_not_go_back_when_replicas_are_asked_one_after_the_other() -> None:
    in_order, by_turns = evictions(), evictions()
    for now in range(200):
        for name, early, late in (("a", 0.0, 0.9), ("b", 0.3, 0.1)):
            in_order.gave_up(name, 1, now * CACHE // 50, float(now))
            by_turns.gave_up(name, 1, now * CACHE // 50, now + (early if now % 2 else late))
    assert by_turns.counts_since(200.0) == pytest.approx(in_order.counts_since(200.0), rel=0.03)


def test_a_replica_that_was_away_gave_up_all_that_it_held() -> None:
    stayed, away = settled(0.5), settled(0.5)
    away.caches({"b": CACHE})
    away.caches(FLEET)
    for made in (stayed, away):
        made.gave_up("a", 2, 0, 2000.0)
    assert away.again() == stayed.again()
    assert away.counts_since(2000.0) == stayed.counts_since(2000.0)


def test_long_prompts_are_dearer_a_token() -> None:
    short, long = evictions(), evictions()
    for made, behind in ((short, 0), (long, 50_000)):
        made.gave_up("a", 1, CACHE, 1.0)
        made.missed(500, behind)
    assert short.again().tokens == long.again().tokens
    assert short.again().pairs < long.again().pairs


def test_only_what_is_asked_for_again_within_a_turnover_or_two_was_given_up_too_early() -> None:
    assert evictions().counts_since(50.0) == float("-inf")
    assert 5000.0 - settled(0.0).counts_since(5000.0) == pytest.approx(AGE_MAX * 100.0, rel=0.05)


def test_the_end_of_an_epoch_gives_up_the_whole_cache() -> None:
    made = evictions()
    made.gave_up("a", 1, 100, 1.0)
    made.missed(100, 0)
    before = made.again().tokens
    made.gave_up("a", 2, 0, 2.0)
    assert made.again().tokens < before


def test_a_replica_that_is_not_known_and_a_count_that_stands_change_nothing() -> None:
    made = settled(0.3)
    before = made.again()
    made.gave_up("stranger", 1, CACHE, 2000.0)
    made.gave_up("a", 1, 500 * CACHE // 50, 2000.0)
    assert made.again() == before


events = st.lists(
    st.one_of(
        st.tuples(st.just("gave_up"), st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 10 * CACHE)),
        st.tuples(st.just("missed"), st.just(""), st.integers(0, 50_000), st.integers(0, 50_000)),
    ),
    max_size=40,
)


@given(events)
def test_no_token_is_computed_again_more_than_once_or_less_than_never(sequence: list[tuple[str, str, int, int]]) -> None:
    made = evictions()
    for now, (what, name, one, other) in enumerate(sequence):
        if what == "gave_up":
            made.gave_up(name, one, other, float(now))
        else:
            made.missed(one, other)
        again = made.again()
        assert 0.0 <= again.tokens <= 1.0
        assert again.pairs >= 0.0
        assert made.counts_since(float(now)) <= now
