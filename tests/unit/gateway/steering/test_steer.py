"""Steering: a table of cases, and properties that hold for every fleet."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.steering.costs.model import CostModel, ModelKey
from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.costs.slowdown import Slowdown
from gateway.steering.evictions import Again
from gateway.steering.steer import Candidate, Choice, Decision, PromptView, affinity_weight, steer
from tests.unit.gateway.steering.costs.test_model import prefill_seconds

GPU = ModelKey("cuda")
PROMPT = 16_000
EVERYBODY = frozenset("abcdefgh")
NAMES = "abcde"


def waiting(tokens: int, **more: int) -> ReplicaLoad:
    """A replica with prompts of `tokens` in front of the next one."""
    pairs = tokens * tokens / 2
    return ReplicaLoad(tokens=tokens, pairs=pairs, head_tokens=tokens, head_pairs=pairs, requests=1, **more)


def replica(name: str, held: int = 0, ahead: int = 0, others: frozenset[str] = EVERYBODY, **more: object) -> Candidate:
    load = more.pop("load", waiting(ahead) if ahead else ReplicaLoad())
    return Candidate(name, held, load, others, GPU, **more)  # type: ignore[arg-type]


def decide(fleet: list[Candidate], tokens: int = PROMPT, turn: int = 0, **view: object) -> Decision:
    return steer(PromptView(tokens, block_size=16, **view), fleet, CostModel(), 0.0, turn)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fleet", "chosen", "source", "action"),
    [
        ([replica("a")], "a", None, Choice.RECOMPUTE),
        ([replica("a", 0, 9000), replica("b", 0, 3000)], "b", None, Choice.RECOMPUTE),
        ([replica("a", 12_000), replica("b")], "a", None, Choice.HIT),
        ([replica("a", 12_000, 30_000), replica("b", 0, 2000)], "b", "a", Choice.PULL),
        ([replica("a", 12_000, 30_000), replica("b", 4000, 2000)], "b", "a", Choice.PULL),
        ([replica("a", 12_000, 30_000), replica("b", 0, 2000, frozenset())], "b", None, Choice.RECOMPUTE),
        ([replica("a", 12_000, 30_000), replica("b", 0, 30_000)], "a", None, Choice.HIT),
        ([replica("a", 12_000, 30_000), replica("b", 12_000, 2000)], "b", None, Choice.HIT),
        ([replica("a", 12_000, 30_000), replica("b", 9000, 20_000), replica("c", 0, 1000)], "c", "a", Choice.PULL),
        (
            [replica("a", 12_000, 30_000), replica("b", 9000, 20_000), replica("c", 0, 0, frozenset("b"))],
            "c",
            "b",
            Choice.PULL,
        ),
        ([replica("a", 64, 30_000), replica("b")], "b", None, Choice.RECOMPUTE),
    ],
)
def test_a_request_goes_where_its_first_token_comes_soonest(
    fleet: list[Candidate], chosen: str, source: str | None, action: Choice
) -> None:
    decision = decide(fleet)
    assert (decision.replica, decision.source, decision.action) == (chosen, source, action)


def test_a_decision_says_what_is_expected() -> None:
    decision = decide([replica("a", 12_000, 30_000), replica("b", 4000)])
    expected = decision.expected
    assert (expected.local_tokens, expected.peer_tokens, expected.computed_tokens) == (4000, 8000, 4000)
    assert decision.best_available_tokens == 12_000
    assert expected.queue_seconds == 0 < expected.transfer_seconds < expected.prefill_seconds
    assert decision.reason.startswith("imports 8000 tokens from a")
    assert {option.replica for option in decision.options} == {"a", "b"}


def test_the_last_token_is_always_computed() -> None:
    assert decide([replica("a", PROMPT)]).expected.computed_tokens == 1


def test_a_small_miss_is_computed_and_not_pulled() -> None:
    decision = decide([replica("a", 15_984, 30_000), replica("b", 15_904)])
    assert (decision.replica, decision.source) == ("b", None)


def test_a_slow_link_carries_the_head_and_the_tail_is_computed_where_that_costs_nothing() -> None:
    slow = [replica("a", 15_984, 90_000, transport="rdma"), replica("b")]
    costs = CostModel()
    decision = steer(PromptView(PROMPT, block_size=16), slow, costs, 0.0)
    assert (decision.action, decision.source) == (Choice.SPLIT, "a")
    assert decision.import_tokens_max == (PROMPT - costs.model(GPU).free_tokens) // 16 * 16
    assert decision.expected.peer_tokens == decision.import_tokens_max


def test_within_the_models_uncertainty_the_holder_keeps_the_request() -> None:
    costs = CostModel()
    pull = steer(PromptView(PROMPT), [replica("a", 12_000, 90_000), replica("b")], costs, 0.0).expected.seconds
    hit = steer(PromptView(PROMPT), [replica("a", 12_000)], costs, 0.0).expected.seconds
    ahead = int((pull - hit) / costs.model(GPU).new_token)
    near = [replica("a", 12_000, ahead), replica("b")]
    far = [replica("a", 12_000, 4 * ahead), replica("b")]
    assert steer(PromptView(PROMPT), near, costs, 0.0).replica == "a"
    assert steer(PromptView(PROMPT), far, costs, 0.0).replica == "b"


def test_a_prompt_that_is_being_computed_is_waited_for_and_not_computed_again() -> None:
    fleet = [replica("a", 0, PROMPT, promised_tokens=15_984), replica("b")]
    decision = decide(fleet)
    assert (decision.replica, decision.action, decision.expected.local_tokens) == ("a", Choice.HIT, 15_984)
    fleet = [replica("a", 0, 4 * PROMPT, promised_tokens=15_984), replica("b")]
    assert decide(fleet).replica == "b"


@pytest.mark.parametrize(("waiting_there", "chosen"), [(0, "b"), (3, "a")])
def test_computing_where_others_wait_costs_what_they_wait_longer(waiting_there: int, chosen: str) -> None:
    there = replica("b", load=waiting(2000, waiting=waiting_there), others=frozenset())
    assert decide([replica("a", 12_000, 20_000), there]).replica == chosen


def test_a_cold_fleet_spreads_over_all_replicas() -> None:
    fleet = [replica(name) for name in "abc"]
    assert [decide(fleet, turn=turn).replica for turn in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_many_decodes_send_a_request_elsewhere() -> None:
    crowded = replica("a", 12_000, load=ReplicaLoad(requests=60, decoding=60))
    assert decide([crowded, replica("b")], decode_seconds=3.0).source == "a"
    assert decide([crowded, replica("b")], decode_seconds=0.0).replica == "a"


def test_a_few_decodes_more_than_elsewhere_are_chance_and_no_reason_for_a_copy() -> None:
    """Copies stay: with 41 prefixes of 8,000 tokens and room for 64, four times as many prompts were computed whole."""
    others = [replica(name, load=ReplicaLoad(requests=2)) for name in "bcdefg"]
    holder = replica("a", 12_000, load=ReplicaLoad(requests=4))
    assert decide([holder, *others, replica("h")], decode_seconds=4.0).replica == "a"


def test_a_hot_prefix_is_copied_before_its_holder_queues_and_a_cool_one_is_not() -> None:
    fleet = [replica("a", 15_000), replica("b")]
    hot = decide(fleet, rate=18.0)
    assert (hot.replica, hot.source) == ("b", "a")
    assert decide(fleet, rate=0.5).replica == "a"
    copied = [replica("a", 15_000), replica("b", 15_000), replica("c")]
    assert decide(copied, rate=18.0).source is None


def test_a_hot_prefix_does_not_move_the_others() -> None:
    fleet = [replica("a", 12_000), replica("b")]
    assert decide(fleet, rate=0.0).replica == "a"


ALL_AGAIN = Again(1.0, 8000.0)
FULL = 0.0


@pytest.mark.parametrize(
    ("ahead", "room", "again", "chosen"),
    [
        (6000, FULL, ALL_AGAIN, "a"),  # a copy in a full cache pushes out what will be computed again: waiting is cheaper
        (6000, FULL, Again(0.5, 4000.0), "a"),
        (6000, FULL, Again(0.0, 0.0), "b"),  # what goes is not missed
        (6000, PROMPT, ALL_AGAIN, "b"),  # nothing has to go
        (6000, PROMPT - 1, ALL_AGAIN, "a"),
        (40_000, FULL, ALL_AGAIN, "b"),  # its holder is loaded: an idle replica is used all the same
    ],
)
def test_a_copy_in_a_full_cache_costs_what_it_pushes_out(ahead: int, room: float, again: Again, chosen: str) -> None:
    fleet = [replica("a", 12_000, ahead, room_tokens=FULL), replica("b", room_tokens=room)]
    assert decide(fleet, again=again).replica == chosen


def test_what_is_ahead_of_a_request_takes_its_share_of_the_room() -> None:
    fleet = [replica("a", 12_000, 6000, room_tokens=FULL), replica("b", 0, 100, room_tokens=PROMPT)]
    assert decide(fleet, again=ALL_AGAIN).replica == "a"
    fleet = [replica("a", 12_000, 6000, room_tokens=FULL), replica("b", 0, 100, room_tokens=PROMPT + 100)]
    assert decide(fleet, again=ALL_AGAIN).replica == "b"


def test_a_hot_prefix_is_copied_into_a_full_cache_before_its_holder_queues() -> None:
    fleet = [replica("a", 15_000, room_tokens=FULL), replica("b", room_tokens=FULL)]
    hot = decide(fleet, rate=18.0, again=ALL_AGAIN)
    assert (hot.replica, hot.source) == ("b", "a")
    assert decide(fleet, rate=0.5, again=ALL_AGAIN).replica == "a"


def test_what_nobody_holds_goes_where_nothing_has_to_go() -> None:
    fleet = [replica("a", room_tokens=FULL), replica("b", room_tokens=PROMPT), replica("c", room_tokens=FULL)]
    assert {decide(fleet, turn=turn, again=ALL_AGAIN).replica for turn in range(6)} == {"b"}


def test_full_caches_share_what_nobody_holds_and_a_little_room_in_one_does_not_matter() -> None:
    fleet = [replica(name, room_tokens=room) for name, room in (("a", 0.0), ("b", 900.0), ("c", 100.0))]
    assert [decide(fleet, turn=turn, again=ALL_AGAIN).replica for turn in range(6)] == ["a", "b", "c", "a", "b", "c"]


def test_where_others_wait_what_is_computed_again_costs_them_too() -> None:
    def chosen(waiting_there: int) -> str:
        crowd = ReplicaLoad(engine_tokens=2000, waiting=waiting_there)
        busy = [replica(name, load=crowd, room_tokens=FULL, takes=False) for name in "cde"]
        fleet = [replica("a", 12_000, 14_000, room_tokens=FULL), replica("b", room_tokens=FULL), *busy]
        return decide(fleet, again=Again(0.5, 4000.0)).replica

    assert (chosen(0), chosen(8)) == ("b", "a")


def test_affinity_decides_among_equals_for_what_nobody_holds() -> None:
    fleet = [replica(name) for name in NAMES]
    chosen = {decide(fleet, turn=turn, affinity="conversation").replica for turn in range(7)}
    assert chosen == {max(NAMES, key=lambda name: affinity_weight("conversation", name))}
    [favourite] = chosen
    busy = [replica(name, 0, 50_000 if name == favourite else 0) for name in NAMES]
    assert decide(busy, affinity="conversation").replica != favourite
    held = [replica(name, 12_000 if name != favourite else 0) for name in NAMES]
    assert decide(held, affinity="conversation").replica != favourite


def test_affinity_moves_only_what_a_lost_replica_had() -> None:
    before = {key: decide([replica(name) for name in NAMES], affinity=str(key)).replica for key in range(200)}
    after = {key: decide([replica(name) for name in NAMES[:-1]], affinity=str(key)).replica for key in range(200)}
    assert all(after[key] == home for key, home in before.items() if home != NAMES[-1])
    assert set(before.values()) == set(NAMES)


def test_a_source_only_is_never_chosen() -> None:
    decision = decide([replica("a", 12_000, takes=False), replica("b")])
    assert (decision.replica, decision.source) == ("b", "a")
    with pytest.raises(ValueError, match="no candidates"):
        decide([replica("a", takes=False)])


def test_without_candidates_there_is_no_decision() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        decide([])


def test_what_was_weighed_is_bounded() -> None:
    fleet = [replica(f"r{place}", 16 * place) for place in range(300)]
    assert len(decide(fleet).options) <= 8


@st.composite
def fleets(draw: st.DrawFn) -> list[Candidate]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    fleet = []
    for name in names:
        load = waiting(draw(st.integers(0, 60_000)), decoding=draw(st.integers(0, 100)), importing=draw(st.integers(0, 3)))
        held = draw(st.integers(0, PROMPT // 16)) * 16
        promised = draw(st.integers(0, 900)) * 16
        others = frozenset(draw(st.sets(st.sampled_from(NAMES))))  # itself and strangers included
        transport = draw(st.sampled_from(["cuda_ipc", "shared_memory", "rdma", "?"]))
        fleet.append(Candidate(name, held, load, others, GPU, transport, promised))
    return fleet


views = st.builds(
    PromptView,
    tokens=st.integers(1, PROMPT),
    affinity=st.sampled_from(["", "x"]),
    rate=st.floats(0, 50),
    decode_seconds=st.floats(0, 20),
    block_size=st.just(16),
)


@given(fleets(), views, st.integers(0, 100))
def test_nobody_but_a_candidate_is_chosen_and_nobody_imports_from_itself(
    fleet: list[Candidate], view: PromptView, turn: int
) -> None:
    decision = steer(view, fleet, CostModel(), 0.0, turn)
    known = {candidate.name: candidate for candidate in fleet}
    assert decision.replica in known
    if decision.source is not None:
        assert decision.source in known.keys() - {decision.replica}
        assert decision.source in known[decision.replica].exchanges_with
        assert known[decision.source].held_tokens > known[decision.replica].held_tokens


@given(fleets(), views, st.integers(0, 100))
def test_tokens_add_up_and_no_time_is_negative(fleet: list[Candidate], view: PromptView, turn: int) -> None:
    expected = steer(view, fleet, CostModel(), 0.0, turn).expected
    assert expected.local_tokens + expected.peer_tokens + expected.computed_tokens == view.tokens
    assert expected.computed_tokens >= 1
    assert min(expected.queue_seconds, expected.transfer_seconds, expected.local_tokens, expected.peer_tokens) >= 0


@given(fleets(), views, st.integers(0, 100))
def test_nothing_is_chosen_that_is_slower_than_computing_on_the_same_replica(
    fleet: list[Candidate], view: PromptView, turn: int
) -> None:
    costs = CostModel()
    decision = steer(view, fleet, costs, 0.0, turn)
    chosen = next(candidate for candidate in fleet if candidate.name == decision.replica)
    computing = prefill_seconds(costs, GPU, 0, view.tokens, chosen.load.decoding)
    queue = costs.model(GPU).queue_seconds(chosen.load, 0.0)
    assert decision.expected.seconds <= (queue + computing) * (1 + 1e-9)


@given(fleets(), st.integers(1, PROMPT), st.integers(0, 100))
def test_nothing_is_chosen_that_is_slower_than_computing_elsewhere_by_more_than_the_doubt(
    fleet: list[Candidate], tokens: int, turn: int
) -> None:
    costs = CostModel()
    decision = steer(PromptView(tokens), fleet, costs, 0.0, turn)
    for candidate in fleet:
        queue = costs.model(GPU).queue_seconds(candidate.load, 0.0)
        computing = prefill_seconds(costs, GPU, 0, tokens, candidate.load.decoding)
        chosen = decision.expected
        doubt = costs.uncertainty() * (queue + computing + chosen.seconds)
        assert chosen.seconds <= queue + computing + doubt


@settings(max_examples=50)
@given(fleets(), views, st.integers(0, 100), st.randoms())
def test_the_order_of_candidates_does_not_matter(fleet: list[Candidate], view: PromptView, turn: int, random: object) -> None:
    shuffled = list(fleet)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert steer(view, fleet, CostModel(), 0.0, turn) == steer(view, shuffled, CostModel(), 0.0, turn)


@given(fleets(), views, fleets(), views, st.integers(0, 100))
def test_what_was_reckoned_for_one_request_says_nothing_of_the_next(
    fleet: list[Candidate], view: PromptView, next_fleet: list[Candidate], next_view: PromptView, turn: int
) -> None:
    costs = CostModel()
    steer(view, fleet, costs, 0.0, turn)
    assert steer(next_view, next_fleet, costs, 0.0, turn) == steer(next_view, next_fleet, CostModel(), 0.0, turn)


@given(fleets(), st.integers(1000, PROMPT), st.integers(0, 100))
def test_more_work_on_the_chosen_replica_never_makes_it_expected_sooner(fleet: list[Candidate], tokens: int, turn: int) -> None:
    before = steer(PromptView(tokens), fleet, CostModel(), 0.0, turn)
    busier = [
        candidate
        if candidate.name != before.replica
        else Candidate(
            candidate.name, candidate.held_tokens, waiting(10**6), candidate.exchanges_with, GPU, candidate.transport
        )
        for candidate in fleet
    ]
    after = steer(PromptView(tokens), busier, CostModel(), 0.0, turn)
    if len(fleet) > 1:
        assert after.replica != before.replica  # a million tokens ahead: everybody else is sooner


rooms = st.lists(st.sampled_from([0.0, 100.0, 10_000.0, 1e6]), min_size=len(NAMES), max_size=len(NAMES))
agains = st.builds(Again, st.floats(0, 1), st.floats(0, 60_000))


@given(fleets(), views, rooms, agains)
def test_neither_room_for_all_nor_what_is_not_missed_changes_a_decision(
    fleet: list[Candidate], view: PromptView, room: list[float], again: Again
) -> None:
    free = [msgspec.structs.replace(candidate, room_tokens=1e9) for candidate in fleet]
    full = [msgspec.structs.replace(candidate, room_tokens=tokens) for candidate, tokens in zip(fleet, room, strict=False)]
    priced = msgspec.structs.replace(view, again=again)
    usual = steer(view, fleet, CostModel(), 0.0, 0)
    assert steer(priced, free, CostModel(), 0.0, 0) == usual
    assert steer(view, full, CostModel(), 0.0, 0) == usual


@given(fleets(), views, rooms, agains)
def test_the_price_of_what_is_given_up_is_bounded_by_computing_as_much(
    fleet: list[Candidate], view: PromptView, room: list[float], again: Again
) -> None:
    costs = CostModel()
    full = [msgspec.structs.replace(candidate, room_tokens=tokens) for candidate, tokens in zip(fleet, room, strict=False)]
    waiting = sum(candidate.load.waiting for candidate in fleet) / len(fleet)
    bound = costs.model(GPU).work_seconds(view.tokens, view.tokens * again.pairs) * (1 + waiting)
    usual = {option.replica: option for option in steer(view, full, costs, 0.0, 0).options}
    for option in steer(msgspec.structs.replace(view, again=again), full, costs, 0.0, 0).options:
        assert option.expected == usual[option.replica].expected  # a price, and no time that anybody waits here
        assert -1e-9 <= option.score - usual[option.replica].score <= bound + 1e-9


class Slow(Slowdown):
    """Of machines that all are slow just now."""

    def factor(self, now: float) -> float:
        return 1.75


@given(fleets(), views, st.integers(0, 100))
def test_a_pace_changes_what_is_expected_and_no_decision(fleet: list[Candidate], view: PromptView, turn: int) -> None:
    fleet = [msgspec.structs.replace(candidate, room_tokens=1000.0 * place) for place, candidate in enumerate(fleet)]
    view = msgspec.structs.replace(view, again=Again(0.5, 4000.0))
    slowed = CostModel()
    slowed.model(GPU).slowdown = Slow()
    usual, slow = (steer(view, fleet, costs, 0.0, turn) for costs in (CostModel(), slowed))
    assert (slow.replica, slow.source, slow.action) == (usual.replica, usual.source, usual.action)
    assert slow.expected.seconds == pytest.approx(1.75 * usual.expected.seconds)
    assert [option.score for option in slow.options] == pytest.approx([1.75 * option.score for option in usual.options])


def test_on_gpus_a_peers_memory_is_preferred_to_host_memory_and_that_to_computing() -> None:
    stored = {"tier": "a.host-memory", "tier_tokens": 12_000}
    holder = replica("b", 12_000, 60_000)
    assert decide([replica("a", others=frozenset("b"), **stored), holder]).source == "b"
    assert decide([replica("a", others=frozenset(), **stored), holder]).source == "a.host-memory"
    on_peer, on_tier = (
        decide([replica("a", others=others, **stored), holder]).expected.transfer_seconds
        for others in (frozenset("b"), frozenset[str]())
    )
    assert 0.02 < on_tier - on_peer < 0.04  # 12,000 tokens are 1.6 GB: at 50 GB/s or 300
