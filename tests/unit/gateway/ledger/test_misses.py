"""Why a prompt was not served from a cache: each reason under its name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gateway.ledger.misses import Case, MissReason, judge
from transport.table.deliveries import DeliveryReason

BLOCK = 16
HELD = Case(prompt_tokens=1000, block_size=BLOCK, predicted_peer=800, best_available=800, best_held=800)
COLD = Case(prompt_tokens=1000, block_size=BLOCK)
COUNTS = st.integers(0, 2000)


def test_what_was_predicted_and_the_best_there_was_is_no_loss() -> None:
    assert judge(replace(HELD, peer=800)).reason is MissReason.NONE
    assert judge(replace(HELD, predicted_local=800, predicted_peer=0, local=800)).reason is MissReason.NONE


def test_more_than_was_predicted_is_no_loss() -> None:
    assert judge(replace(HELD, local=16, peer=800)).reason is MissReason.NONE
    assert judge(replace(COLD, local=992)).reason is MissReason.NONE


def test_a_prompt_without_a_full_block_loses_nothing() -> None:
    assert judge(replace(COLD, prompt_tokens=BLOCK)).reason is MissReason.NONE
    assert judge(replace(COLD, prompt_tokens=0)).reason is MissReason.NONE


def test_a_prompt_that_nobody_held_is_cold_and_nothing_was_lost() -> None:
    loss = judge(COLD)
    assert (loss.reason, loss.tokens) == (MissReason.COLD, 0)


def test_computing_what_was_planned_to_be_computed_though_somebody_held_it_is_load() -> None:
    loss = judge(replace(HELD, predicted_peer=0))
    assert (loss.reason, loss.tokens) == (MissReason.LOAD, 800)


def test_a_split_that_was_planned_is_load_for_its_tail() -> None:
    loss = judge(replace(HELD, predicted_peer=320, peer=320, why=DeliveryReason.LIMITED))
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
    loss = judge(replace(HELD, peer=160, why=why))
    assert (loss.reason, loss.tokens) == (reason, 640)


def test_what_the_engine_says_of_an_import_counts_only_if_something_was_lost() -> None:
    assert judge(replace(HELD, peer=800, why=DeliveryReason.SOURCE_HELD_LESS)).reason is MissReason.NONE
    assert judge(replace(COLD, why=DeliveryReason.NO_SOURCE_GIVEN)).reason is MissReason.COLD


def test_what_another_request_was_only_computing_yet_was_promised_and_not_lost_by_anybody() -> None:
    promised = replace(COLD, predicted_local=800, best_available=800, best_held=320)
    loss = judge(replace(promised, local=320))
    assert (loss.reason, loss.tokens) == (MissReason.PROMISED, 480)
    assert judge(replace(promised, local=160)).reason is MissReason.EVICTED


def test_a_replica_that_lost_its_own_blocks_before_the_first_step_evicted_them() -> None:
    loss = judge(replace(HELD, predicted_local=800, predicted_peer=0, local=480))
    assert (loss.reason, loss.tokens) == (MissReason.EVICTED, 320)


def test_what_was_computed_before_and_nobody_holds_any_more_was_evicted() -> None:
    loss = judge(replace(COLD, formerly=640))
    assert (loss.reason, loss.tokens) == (MissReason.EVICTED, 640)
    loss = judge(replace(HELD, peer=800, formerly=960))
    assert (loss.reason, loss.tokens) == (MissReason.EVICTED, 160)


def test_what_another_tenant_holds_is_the_tenant_boundary() -> None:
    loss = judge(replace(COLD, elsewhere=640))
    assert (loss.reason, loss.tokens) == (MissReason.TENANT_BOUNDARY, 640)


def test_ids_that_are_not_the_engines_are_a_parity_loss_whether_guessed_or_unknown() -> None:
    blind = judge(replace(COLD, looked_up=False, parity_exact=False))
    assert (blind.reason, blind.tokens) == (MissReason.PARITY, 992)
    guess = judge(replace(HELD, predicted_local=800, predicted_peer=0, parity_exact=False))
    assert (guess.reason, guess.tokens) == (MissReason.PARITY, 800)


def test_unknown_ids_are_no_parity_loss_where_the_ids_are_the_engines() -> None:
    assert judge(replace(COLD, looked_up=False)).reason is MissReason.UNKNOWN


def test_a_request_that_reads_no_cache_is_off() -> None:
    assert judge(replace(HELD, reads_cache=False)).reason is MissReason.OFF
    assert judge(replace(HELD, why=DeliveryReason.READS_NO_CACHE)).reason is MissReason.OFF


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
        elsewhere=COUNTS,
    )
)
def test_tokens_are_lost_only_with_a_reason_and_never_a_negative_number(case: Case) -> None:
    loss = judge(case)
    assert loss.tokens >= 0
    if loss.reason in (MissReason.NONE, MissReason.COLD):
        assert loss.tokens == 0
    if case.reads_cache and case.delivered >= case.useful and case.why is not DeliveryReason.READS_NO_CACHE:
        assert loss.reason is MissReason.NONE
