"""Why a prompt was not served from a cache: each reason under its name."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ledger.judging import judge, useful_tokens
from gateway.ledger.misses import Miss, MissReason
from tests.unit.gateway.ledger.begun_attempts import begun
from transport.table.deliveries import Delivery, DeliveryReason

BLOCK = 16


@dataclass(frozen=True)
class Case:
    """What an attempt is judged by, in prompt tokens."""

    prompt_tokens: int
    block_size: int
    predicted_local: int = 0
    predicted_peer: int = 0
    best_available: int = 0
    best_held: int = 0
    local: int = 0
    peer: int = 0
    looked_up: bool = True
    parity_exact: bool = True
    reads_cache: bool = True
    why: DeliveryReason = DeliveryReason.NONE
    formerly: int = 0
    flushed: bool = False


def judged(case: Case) -> Miss:
    attempt = begun(
        prompt_tokens=case.prompt_tokens,
        block_size=case.block_size,
        local_tokens=case.predicted_local,
        peer_tokens=case.predicted_peer,
        best_available_tokens=case.best_available,
        best_held_tokens=case.best_held,
        formerly_tokens=case.formerly,
    )
    attempt.flushed = case.flushed
    attempt.looked_up, attempt.parity_exact, attempt.reads_cache = case.looked_up, case.parity_exact, case.reads_cache
    attempt.add(Delivery(prompt_tokens=case.prompt_tokens, local_tokens=case.local, peer_tokens=case.peer, why=case.why))
    return judge(attempt)


HELD = Case(prompt_tokens=1000, block_size=BLOCK, predicted_peer=800, best_available=800, best_held=800)
COLD = Case(prompt_tokens=1000, block_size=BLOCK)
COUNTS = st.integers(0, 2000)


def test_a_further_record_is_judged_too() -> None:
    attempt = begun(prompt_tokens=1000, block_size=BLOCK, peer_tokens=800, best_available_tokens=800, best_held_tokens=800)
    attempt.add(Delivery(prompt_tokens=500, computed_tokens=500))
    assert judge(attempt).tokens == 800
    attempt.add(Delivery(prompt_tokens=1000, peer_tokens=800, computed_tokens=200))
    attempt.add(Delivery(prompt_tokens=1000, computed_tokens=1000))
    assert attempt.steered == attempt.deliveries[1]
    assert judge(attempt).reason is MissReason.NONE


def test_what_was_predicted_and_the_best_there_was_is_no_loss() -> None:
    assert judged(replace(HELD, peer=800)).reason is MissReason.NONE
    assert judged(replace(HELD, predicted_local=800, predicted_peer=0, local=800)).reason is MissReason.NONE


def test_more_than_was_predicted_is_no_loss() -> None:
    assert judged(replace(HELD, local=16, peer=800)).reason is MissReason.NONE
    assert judged(replace(COLD, local=992)).reason is MissReason.NONE


def test_a_prompt_without_a_full_block_loses_nothing() -> None:
    assert judged(replace(COLD, prompt_tokens=BLOCK)).reason is MissReason.NONE
    assert judged(replace(COLD, prompt_tokens=0)).reason is MissReason.NONE


def test_a_prompt_that_nobody_held_is_cold_and_nothing_was_lost() -> None:
    loss = judged(COLD)
    assert (loss.reason, loss.tokens) == (MissReason.COLD, 0)


def test_what_was_asked_for_before_a_flush_and_not_since_is_flushed() -> None:
    asked = replace(COLD, formerly=640)
    assert [judged(each).reason for each in (asked, replace(asked, flushed=True))] == [MissReason.EVICTED, MissReason.FLUSHED]
    assert judged(replace(asked, flushed=True)).tokens == 640
    assert judged(replace(COLD, flushed=True)).reason is MissReason.COLD


def test_computing_what_was_planned_to_be_computed_though_somebody_held_it_is_load() -> None:
    loss = judged(replace(HELD, predicted_peer=0))
    assert (loss.reason, loss.tokens) == (MissReason.LOAD, 800)


def test_a_split_that_was_planned_is_load_for_its_tail() -> None:
    loss = judged(replace(HELD, predicted_peer=320, peer=320, why=DeliveryReason.LIMITED))
    assert (loss.reason, loss.tokens) == (MissReason.LOAD, 480)


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        (DeliveryReason.CHECK_FAILED, MissReason.CHECK_FAILED),
        (DeliveryReason.COPY_FAILED, MissReason.CHECK_FAILED),
        (DeliveryReason.SOURCE_UNREADABLE, MissReason.CHECK_FAILED),
        (DeliveryReason.SOURCE_GONE, MissReason.STALE),
        (DeliveryReason.SOURCE_HELD_LESS, MissReason.STALE),
        (DeliveryReason.NOT_EXCHANGING, MissReason.OFF),
        (DeliveryReason.ALLOCATION, MissReason.LOAD),
        (DeliveryReason.NONE, MissReason.UNKNOWN),
    ],
)
def test_an_import_that_fell_short_is_named_as_the_engine_says(why: DeliveryReason, reason: MissReason) -> None:
    loss = judged(replace(HELD, peer=160, why=why))
    assert (loss.reason, loss.tokens) == (reason, 640)


def test_what_the_engine_says_of_an_import_counts_only_if_something_was_lost() -> None:
    assert judged(replace(HELD, peer=800, why=DeliveryReason.SOURCE_HELD_LESS)).reason is MissReason.NONE
    assert judged(replace(COLD, why=DeliveryReason.NO_SOURCE_GIVEN)).reason is MissReason.COLD


def test_what_another_request_was_only_computing_yet_was_promised_and_not_lost_by_anybody() -> None:
    promised = replace(COLD, predicted_local=800, best_available=800, best_held=320)
    loss = judged(replace(promised, local=320))
    assert (loss.reason, loss.tokens) == (MissReason.PROMISED, 480)
    assert judged(replace(promised, local=160)).reason is MissReason.EVICTED


def test_a_replica_that_lost_its_own_blocks_before_the_first_step_evicted_them() -> None:
    loss = judged(replace(HELD, predicted_local=800, predicted_peer=0, local=480))
    assert (loss.reason, loss.tokens) == (MissReason.EVICTED, 320)


def test_what_was_asked_for_before_and_nobody_holds_any_more_was_evicted() -> None:
    loss = judged(replace(COLD, formerly=640))
    assert (loss.reason, loss.tokens) == (MissReason.EVICTED, 640)
    loss = judged(replace(HELD, peer=800, formerly=960))
    assert (loss.reason, loss.tokens) == (MissReason.EVICTED, 160)


def test_ids_that_are_not_the_engines_are_a_parity_loss_whether_guessed_or_unknown() -> None:
    blind = judged(replace(COLD, looked_up=False, parity_exact=False))
    assert (blind.reason, blind.tokens) == (MissReason.PARITY, 992)
    guess = judged(replace(HELD, predicted_local=800, predicted_peer=0, parity_exact=False))
    assert (guess.reason, guess.tokens) == (MissReason.PARITY, 800)


def test_unknown_ids_are_no_parity_loss_where_the_ids_are_the_engines() -> None:
    assert judged(replace(COLD, looked_up=False)).reason is MissReason.UNKNOWN


def test_a_request_that_reads_no_cache_is_off() -> None:
    assert judged(replace(HELD, reads_cache=False)).reason is MissReason.OFF
    assert judged(replace(HELD, why=DeliveryReason.READS_NO_CACHE)).reason is MissReason.OFF


@given(
    case=st.builds(
        Case,
        prompt_tokens=COUNTS,
        block_size=st.sampled_from([1, 16, 32]),
        predicted_local=COUNTS,
        predicted_peer=COUNTS,
        best_available=COUNTS,
        best_held=COUNTS,
        local=COUNTS,
        peer=COUNTS,
        looked_up=st.booleans(),
        parity_exact=st.booleans(),
        reads_cache=st.booleans(),
        why=st.sampled_from(DeliveryReason),
        formerly=COUNTS,
    )
)
def test_tokens_are_lost_only_with_a_reason_and_never_a_negative_number(case: Case) -> None:
    loss = judged(case)
    assert loss.tokens >= 0
    if loss.reason in (MissReason.NONE, MissReason.COLD):
        assert loss.tokens == 0
    useful = useful_tokens(case.prompt_tokens, case.block_size)
    if case.reads_cache and case.local + case.peer >= useful and case.why is not DeliveryReason.READS_NO_CACHE:
        assert loss.reason is MissReason.NONE
