"""The ledger: what it keeps, what it adds up, and when an attempt is settled."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import astuple, replace

from gateway.ledger.attempts import Entry, Planned
from gateway.ledger.ledger import ATTEMPTS_KEPT, LEFT_STATUS, LOST_STATUS, UNREPORTED_SECONDS, Ledger
from gateway.ledger.misses import MissReason, judge
from gateway.steering.choices import Choice
from tests.unit.gateway.ledger.planned_attempts import planned
from transport.table.deliveries import Delivery, DeliveryReason


def pulled(tag: int = 11, **changes: Any) -> Planned:
    """A plan to import 800 of 1000 tokens."""
    held = {
        "source": "b",
        "action": Choice.PULL,
        "peer_tokens": 800,
        "best_available_tokens": 800,
        "best_held_tokens": 800,
    }
    return planned(tag, **{"request_id": "r1", "prompt_tokens": 1000, "block_size": 16, **held, **changes})


PLAN = pulled()
PULLED = Delivery(
    tag=11, scheduled_ns=5, first_token_ns=9, prompt_tokens=1000, peer_tokens=800, computed_tokens=200, source="b"
)


def test_an_attempt_that_got_what_was_planned_is_settled_at_its_end_without_loss() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 100.0)
    ledger.delivered(PULLED)
    ledger.first_byte(entry, 100.5)
    ledger.first_byte(entry, 101.0)
    assert ledger.ended(entry, 200, 102.0)
    assert ledger.settle(entry).reason is MissReason.NONE
    assert (entry.first_byte_seconds, entry.ended_seconds, entry.status) == (0.5, 2.0, 200)
    sums = ledger.sums
    assert (sums.settled, sums.predicted_tokens, sums.best_available_tokens) == (1, 800, 800)
    assert (sums.local_tokens, sums.peer_tokens, sums.computed_tokens) == (0, 800, 200)
    assert sums.requests_by_reason == {"none": 1}


def test_an_attempt_is_settled_once() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    ledger.delivered(PULLED)
    ledger.ended(entry, 200, 1.0)
    assert ledger.settle(entry) is ledger.settle(entry, formerly=992)
    assert ledger.sums.settled == 1


def test_lost_tokens_are_summed_by_reason() -> None:
    ledger = Ledger(10)
    for tag in (1, 2):
        entry = ledger.open(planned(tag, prompt_tokens=1000, block_size=16), 0.0)
        ledger.delivered(replace(PULLED, tag=tag, peer_tokens=0, computed_tokens=1000, source=""))
        ledger.ended(entry, 200, 1.0)
        ledger.settle(entry, formerly=640)
    assert ledger.sums.requests_by_reason == {"evicted": 2}
    assert ledger.sums.lost_tokens_by_reason == {"evicted": 1280}


def test_a_record_that_comes_late_is_waited_for() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    assert not ledger.ended(entry, 200, 1.0)
    assert ledger.due(1.1) == []
    ledger.delivered(PULLED)
    assert ledger.due(1.2) == [entry]
    assert ledger.settle(entry).reason is MissReason.NONE
    assert ledger.due(100.0) == []


def test_a_record_that_never_comes_makes_the_reason_unknown() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    ledger.ended(entry, 200, 1.0)
    assert ledger.due(1.0 + UNREPORTED_SECONDS) == [entry]
    assert ledger.settle(entry).reason is MissReason.UNKNOWN


def test_a_client_that_leaves_before_anything_is_computed_is_no_loss_of_a_cache() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    assert not ledger.ended(entry, LEFT_STATUS, 1.0)
    ledger.delivered(Delivery(tag=11, arrived_ns=3, prompt_tokens=1000))
    assert ledger.due(1.1) == [entry]
    assert ledger.settle(entry).reason is MissReason.LEFT


def test_a_client_that_leaves_while_its_answer_runs_is_judged_like_any_other() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    ledger.delivered(replace(PULLED, peer_tokens=0, computed_tokens=1000))
    assert ledger.ended(entry, LEFT_STATUS, 1.0)
    assert ledger.settle(entry).reason is MissReason.UNKNOWN
    assert ledger.sums.lost_tokens_by_reason == {"unknown": 800}


def test_an_attempt_whose_replica_was_lost_is_retried_and_both_are_kept_under_the_request() -> None:
    ledger = Ledger(10)
    first = ledger.open(PLAN, 0.0)
    assert ledger.ended(first, LOST_STATUS, 1.0)
    assert ledger.settle(first).reason is MissReason.RETRIED
    second = ledger.open(pulled(12, replica="c"), 1.0)
    kept = ledger.attempts("r1")
    assert [entry.planned for entry in kept] == [first.planned, second.planned]
    assert [entry.settled for entry in kept] == [True, False]


def test_a_refused_request_and_a_replica_without_a_table_wait_for_no_record() -> None:
    ledger = Ledger(10)
    refused = ledger.open(PLAN, 0.0)
    assert ledger.ended(refused, 400, 1.0)
    assert ledger.settle(refused).reason is MissReason.NONE
    plain = ledger.open(pulled(12, reports=False), 0.0)
    assert ledger.ended(plain, 200, 1.0)
    assert ledger.settle(plain).reason is MissReason.OFF


def test_several_prompts_are_summed_and_the_longest_is_judged() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    ledger.delivered(Delivery(tag=11, scheduled_ns=1, first_token_ns=2, prompt_tokens=40, computed_tokens=40))
    ledger.delivered(PULLED)
    ledger.ended(entry, 200, 1.0)
    assert ledger.settle(entry).reason is MissReason.NONE
    assert (ledger.sums.peer_tokens, ledger.sums.computed_tokens) == (800, 240)


def test_entries_and_attempts_of_one_id_are_bounded() -> None:
    ledger = Ledger(100)
    for tag in range(1, 300):
        ledger.open(pulled(tag, request_id=f"r{tag}"), 0.0)
    assert len(ledger) == 100
    assert ledger.attempts("r199") == ()
    assert len(ledger.attempts("r200")) == 1
    assert ledger.sums.dropped == 199
    for tag in range(1000, 1000 + 3 * ATTEMPTS_KEPT):
        ledger.open(pulled(tag, request_id="same"), 0.0)
    assert len(ledger.attempts("same")) == ATTEMPTS_KEPT


def test_a_forgotten_attempt_still_counts_and_is_not_waited_for() -> None:
    ledger = Ledger(1)
    entry = ledger.open(PLAN, 0.0)
    ledger.open(pulled(12), 0.0)
    assert ledger.ended(entry, 200, 1.0)
    assert ledger.due(1.0) == [entry]
    assert ledger.settle(entry).reason is MissReason.UNKNOWN
    assert ledger.due(1e9) == []


def test_records_of_others_are_counted_and_those_without_a_tag_are_not_ours() -> None:
    ledger = Ledger(1)
    ledger.delivered(Delivery(tag=99))
    ledger.delivered(Delivery())
    assert ledger.sums.unmatched_deliveries == 1


def test_a_settled_attempt_is_kept_as_it_was_and_without_its_prompt() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 100.0, range(1000), "adapter")
    ledger.delivered(PULLED)
    ledger.first_byte(entry, 100.5)
    ledger.ended(entry, 200, 102.0)
    ledger.settle(entry)
    (kept,) = ledger.attempts("r1")
    assert kept is not entry
    assert astuple(kept) == astuple(entry)
    assert kept.ids is None


def test_a_record_that_comes_after_its_attempt_was_settled_is_shown() -> None:
    ledger = Ledger(10)
    entry = ledger.open(PLAN, 0.0)
    ledger.delivered(PULLED)
    ledger.ended(entry, 200, 1.0)
    ledger.settle(entry)
    ledger.delivered(replace(PULLED, prompt_tokens=40))
    (kept,) = ledger.attempts("r1")
    assert [delivery.prompt_tokens for delivery in kept.deliveries] == [1000, 40]
    assert ledger.sums.settled == 1


def test_an_attempt_with_a_text_that_is_no_unicode_is_kept_too() -> None:
    ledger = Ledger(1)
    entry = ledger.open(pulled(model="\ud800"), 0.0)
    ledger.delivered(PULLED)
    ledger.ended(entry, 200, 1.0)
    ledger.settle(entry)
    assert ledger.attempts("r1") == (entry,)
    ledger.open(pulled(12, request_id="r2"), 2.0)
    assert ledger.attempts("r1") == ()
    assert ledger.sums.dropped == 0


@given(
    prompt=st.integers(1, 60),
    block_size=st.sampled_from([1, 16]),
    best=st.integers(0, 60),
    local=st.integers(0, 60),
    why=st.sampled_from(list(DeliveryReason)),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_what_most_are_judged_to_be_is_what_they_are_judged_to_be_in_full(
    prompt: int, block_size: int, best: int, local: int, why: DeliveryReason, flags: tuple[bool, bool]
) -> None:
    plan = planned(prompt_tokens=prompt, block_size=block_size, best_available_tokens=best, best_held_tokens=best)
    entry = Entry(replace(plan, looked_up=flags[0], reads_cache=flags[1]), 0.0)
    entry.deliveries = (Delivery(tag=1, scheduled_ns=1, prompt_tokens=prompt, local_tokens=local, why=why),)
    assert entry.judged() == judge(entry.case())
