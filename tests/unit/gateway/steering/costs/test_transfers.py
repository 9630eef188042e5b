"""What imports are expected to take, and that a wrong estimate does not keep itself wrong by keeping anybody from importing."""

import random
from operator import mul

import pytest

from gateway.steering.costs.model import CostModel, ModelKey, Outcome, pairs
from gateway.steering.costs.priors import TRANSPORT_PRIORS
from gateway.steering.costs.replica_load import IDLE, ReplicaLoad
from gateway.steering.costs.transfers import FADE_SECONDS, Transfers
from gateway.steering.steer import Candidate, PromptView, steer

GPU = ModelKey("cuda", "m")
PAIR = ("b", "a", "cuda_ipc")
KV_BYTES = 8000 * 131072
HELD, PROMPT = 8000, 8064


def expected(transfers: Transfers, taker: str = "b", source: str = "a") -> float:
    fixed, a_byte = transfers.terms(taker, source, "cuda_ipc")
    return fixed + a_byte * KV_BYTES


PRIOR = expected(Transfers(400))


def slow(transfers: Transfers, factor: float, count: int = 20, now: float = 0.0) -> None:
    for _ in range(count):
        transfers.observe(PAIR, KV_BYTES, factor * PRIOR, now)


def test_before_any_import_the_prior_speaks() -> None:
    assert Transfers(400).terms("b", "a", "cuda_ipc") == TRANSPORT_PRIORS["cuda_ipc"]


def test_what_was_learnt_fades_when_nothing_is_imported_and_a_pair_is_forgotten() -> None:
    transfers = Transfers(400)
    slow(transfers, 100)
    assert expected(transfers) == pytest.approx(100 * PRIOR, rel=0.05)
    transfers.pass_time(0.9 * FADE_SECONDS)
    assert expected(transfers) == pytest.approx(100 * PRIOR, rel=0.05)  # this pair still knows
    assert expected(transfers, "c") < 20 * PRIOR
    transfers.pass_time(2 * FADE_SECONDS)
    assert expected(transfers) == expected(transfers, "c") < 3 * PRIOR
    assert [pair for pair, _, _ in transfers.known()] == [("", "", "cuda_ipc")]


def test_after_a_long_time_one_import_tells_what_holds() -> None:
    for factor in (1, 100):
        transfers = Transfers(400)
        slow(transfers, 100)
        transfers.observe(PAIR, KV_BYTES, factor * PRIOR, 2 * FADE_SECONDS)
        transfers.pass_time(2 * FADE_SECONDS)
        assert expected(transfers) == pytest.approx(factor * PRIOR, rel=0.5)


@pytest.mark.parametrize("every", [1.0, 60.0, 300.0])
def test_a_transport_unlike_its_prior_is_known_as_it_is_however_seldom_it_is_used(every: float) -> None:
    transfers, rng = Transfers(400), random.Random(5)
    now = 0.0
    for _ in range(200):
        now += every
        transfers.observe(PAIR, KV_BYTES, 5 * PRIOR * rng.lognormvariate(0, 0.1), now)
    assert expected(transfers) == pytest.approx(5 * PRIOR, rel=0.1)
    assert expected(transfers, "c") == pytest.approx(5 * PRIOR, rel=0.1)


def pulls_in_each_period(slow_until: float, periods: int = 6) -> list[int]:
    """A busy holder, an idle replica, 100 requests in each FADE_SECONDS; imports take 100 times as long until `slow_until`."""
    costs, counts = CostModel(), [0] * periods
    exchanging = frozenset("ab")
    for turn in range(100 * periods):
        now = turn * FADE_SECONDS / 100
        busy = ReplicaLoad(tokens=60_000, pairs=pairs(0, 60_000), requests=1, waiting=1, since=now)
        holder = Candidate("a", HELD, busy, exchanging, GPU, "cuda_ipc")
        decision = steer(
            PromptView(PROMPT, block_size=16), [holder, Candidate("b", 0, IDLE, exchanging, GPU, "cuda_ipc")], costs, now, turn
        )
        assert decision.replica == "b"
        peer = decision.expected.peer_tokens
        took = PRIOR * (100 if now < slow_until else 1) if peer else 0.0
        prefill, _ = CostModel().model(GPU).computing(peer, PROMPT)
        outcome = Outcome(
            GPU, "b", decision.source, "cuda_ipc", IDLE, now, PROMPT, PROMPT - peer, peer, decision.expected.seconds,
            prefill + took, took if peer else None, peer * 131072,
        )  # fmt: skip
        costs.observe(outcome)
        counts[turn // 100] += peer > 0
    return counts


def test_a_slow_start_does_not_end_imports_for_ever() -> None:
    counts = pulls_in_each_period(slow_until=FADE_SECONDS / 10)
    assert counts[1:] == [100] * 5


def test_imports_that_stay_slow_are_tried_now_and_then() -> None:
    counts = pulls_in_each_period(slow_until=1e9)
    assert all(1 <= count <= 8 for count in counts)


def test_what_was_measured_beforehand_is_expected_until_imports_tell() -> None:
    transfers = Transfers(64)
    fixed, a_byte = TRANSPORT_PRIORS["tcp"]
    assert transfers.terms("a", "b", "tcp") == (fixed, a_byte)
    transfers.measured("tcp", 40e9)
    assert transfers.terms("a", "b", "tcp") == (fixed, 1 / 40e9)
    transfers.measured("tcp", 0.0)
    assert transfers.terms("a", "b", "tcp") == (fixed, 1 / 40e9)
    for _ in range(20):
        transfers.observe(("a", "b", "tcp"), 1e9, 1.0, 0.0)
    learnt = transfers.terms("a", "b", "tcp")
    assert fixed + 0.9 < learnt[0] + learnt[1] * 1e9 < 1.1
    transfers.measured("tcp", 20e9)
    assert transfers.terms("a", "b", "tcp") == learnt


def test_what_was_measured_is_what_remains_when_what_imports_told_has_faded() -> None:
    transfers = Transfers(64)
    fixed, _ = TRANSPORT_PRIORS["tcp"]
    for _ in range(20):
        transfers.observe(("a", "b", "tcp"), 1e9, 1.0, 0.0)
    learnt = transfers.terms("a", "c", "tcp")
    transfers.measured("tcp", 40e9)
    assert transfers.terms("a", "c", "tcp") == learnt
    transfers.observe(("a", "b", "tcp"), 1e9, 1.0, 0.0)
    assert sum(map(mul, transfers.terms("a", "c", "tcp"), (1, 1e9))) == pytest.approx(1.0, rel=0.1)
    transfers.pass_time(20 * FADE_SECONDS)
    assert transfers.terms("a", "c", "tcp") == pytest.approx((fixed, 1 / 40e9), rel=0.01)
