"""Steering: a table of cases, and properties that hold for every fleet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.steering import Candidate, Decision, best_source, steer

BUSY = 4


def replica(name: str, held: int = 0, in_flight: int = 0, *others: str) -> Candidate:
    return Candidate(name, held, in_flight, frozenset(others))


@pytest.mark.parametrize(
    ("fleet", "expected", "source"),
    [
        ([replica("a")], "a", None),
        ([replica("a", 0, 3), replica("b", 0, 1)], "b", None),
        ([replica("a", 5, 3), replica("b", 2, 0)], "a", None),
        ([replica("a", 5, 3), replica("b", 5, 1)], "b", None),
        ([replica("a", 5, BUSY, "b"), replica("b", 0, 1, "a")], "b", "a"),
        ([replica("a", 5, BUSY, "b"), replica("b", 2, 1, "a")], "b", "a"),
        ([replica("a", 5, BUSY), replica("b", 2, 1)], "b", None),
        ([replica("a", 5, BUSY), replica("b", 0, BUSY)], "a", None),
        ([replica("a", 5, BUSY + 2), replica("b", 5, BUSY + 1)], "b", None),
        ([replica("a", 9, BUSY), replica("b", 5, 2), replica("c", 0, 1, "b")], "c", "b"),
        ([replica("a", 9, BUSY), replica("b", 9, 3), replica("c", 0, 1, "a", "b")], "b", None),
    ],
)
def test_a_request_goes_to_the_longest_prefix_until_its_holder_is_busy(
    fleet: list[Candidate], expected: str, source: str | None
) -> None:
    decision = steer(fleet, replica_requests_max=BUSY)
    assert (decision.replica, decision.source) == (expected, source)


def test_the_source_is_the_longest_holder_that_the_taker_can_read() -> None:
    taker = replica("a", 1, 0, "b", "c", "d")
    fleet = [taker, replica("b", 3), replica("c", 5, 9), replica("d", 5, 1), replica("e", 9)]
    assert best_source(taker, fleet) == "d"
    assert best_source(replica("a", 5, 0, "b", "c"), fleet) is None


def test_a_cold_fleet_spreads_over_all_replicas() -> None:
    fleet = [replica(name) for name in "abc"]
    chosen = [steer(fleet, replica_requests_max=BUSY, turn=turn).replica for turn in range(6)]
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_without_candidates_there_is_no_decision() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        steer([], replica_requests_max=BUSY)


NAMES = "abcde"


@st.composite
def fleets(draw: st.DrawFn) -> list[Candidate]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    return [
        Candidate(
            name,
            draw(st.integers(0, 4)),
            draw(st.integers(0, 2 * BUSY)),
            frozenset(draw(st.sets(st.sampled_from(NAMES)))),  # itself and strangers included
        )
        for name in names
    ]


def decide(fleet: list[Candidate], turn: int) -> tuple[Decision, dict[str, Candidate]]:
    return steer(fleet, replica_requests_max=BUSY, turn=turn), {candidate.name: candidate for candidate in fleet}


@given(fleets(), st.integers(0, 100))
def test_nobody_but_a_candidate_is_chosen_and_nobody_imports_from_itself(fleet: list[Candidate], turn: int) -> None:
    decision, known = decide(fleet, turn)
    assert decision.replica in known
    assert decision.source is None or decision.source in known.keys() - {decision.replica}


@given(fleets(), st.integers(0, 100))
def test_a_source_holds_more_than_the_chosen_replica_and_can_be_read_by_it(fleet: list[Candidate], turn: int) -> None:
    decision, known = decide(fleet, turn)
    if decision.source is not None:
        assert known[decision.source].held_blocks > known[decision.replica].held_blocks
        assert decision.source in known[decision.replica].exchanges_with


@given(fleets(), st.integers(0, 100), st.randoms())
def test_the_order_of_candidates_does_not_matter(fleet: list[Candidate], turn: int, random: object) -> None:
    shuffled = list(fleet)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decide(fleet, turn)[0] == decide(shuffled, turn)[0]


@given(fleets(), st.integers(0, 100))
def test_a_longest_holder_that_is_not_busy_gets_the_request(fleet: list[Candidate], turn: int) -> None:
    decision, known = decide(fleet, turn)
    longest = max(candidate.held_blocks for candidate in fleet)
    holders = [candidate for candidate in fleet if candidate.held_blocks == longest]
    if longest and min(holder.in_flight for holder in holders) < BUSY:
        assert known[decision.replica].held_blocks == longest


@given(fleets(), st.integers(0, 100))
def test_a_busy_holder_is_relieved_by_whoever_is_less_busy(fleet: list[Candidate], turn: int) -> None:
    decision, known = decide(fleet, turn)
    if known[decision.replica].in_flight >= BUSY:
        assert known[decision.replica].in_flight == min(candidate.in_flight for candidate in fleet)


@given(fleets(), st.integers(0, 100))
def test_nobody_waits_behind_more_requests_for_a_shorter_prefix(fleet: list[Candidate], turn: int) -> None:
    decision, known = decide(fleet, turn)
    chosen = known[decision.replica]
    assert not any(other.held_blocks > chosen.held_blocks and other.in_flight < min(chosen.in_flight, BUSY) for other in fleet)
