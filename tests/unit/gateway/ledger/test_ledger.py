"""The ledger: what it keeps, what it adds up, and when an attempt is settled."""

from typing import Any

from msgspec.structs import replace

from gateway.ledger.attempts import Attempt
from gateway.ledger.ledger import ATTEMPTS_KEPT, LEFT_STATUS, LOST_STATUS, UNREPORTED_SECONDS, Ledger
from gateway.ledger.misses import MissReason
from gateway.steering.choices import Choice
from tests.unit.gateway.ledger.begun_attempts import begun
from transport.table.deliveries import Delivery


def pulled(tag: int = 11, **changes: Any) -> Attempt:
    """An attempt that is to import 800 of 1000 tokens."""
    held = {
        "source": "b",
        "action": Choice.PULL,
        "peer_tokens": 800,
        "best_available_tokens": 800,
        "best_held_tokens": 800,
    }
    return begun(tag, **{"request_id": "r1", "prompt_tokens": 1000, "block_size": 16, **held, **changes})


PULLED = Delivery(
    tag=11, scheduled_ns=5, first_token_ns=9, prompt_tokens=1000, peer_tokens=800, computed_tokens=200, source="b"
)


def opened(ledger: Ledger, attempt: Attempt) -> Attempt:
    ledger.open(attempt)
    return attempt


def counted(by_reason: dict[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in by_reason.items() if count}


def reason(attempt: Attempt) -> MissReason | None:
    return attempt.miss.reason if attempt.miss is not None else None


def test_an_attempt_that_got_what_was_planned_is_settled_at_its_end_without_loss() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled(began_at=100.0))
    ledger.delivered(PULLED)
    ledger.ended(attempt, 200, 102.0)
    assert reason(attempt) is MissReason.NONE
    assert (attempt.ended_seconds, attempt.status) == (2.0, 200)
    sums = ledger.sums
    assert (sums.settled, sums.predicted_tokens, sums.best_available_tokens) == (1, 800, 800)
    assert (sums.local_tokens, sums.peer_tokens, sums.computed_tokens) == (0, 800, 200)
    assert counted(sums.requests) == {"none": 1}


def test_lost_tokens_are_summed_by_reason() -> None:
    ledger = Ledger(10)
    for tag in (1, 2):
        attempt = opened(ledger, begun(tag, prompt_tokens=1000, block_size=16, formerly_tokens=640))
        ledger.delivered(replace(PULLED, tag=tag, peer_tokens=0, computed_tokens=1000, source=""))
        ledger.ended(attempt, 200, 1.0)
    assert counted(ledger.sums.requests) == {"evicted": 2}
    assert counted(ledger.sums.lost_tokens) == {"evicted": 1280}


def test_a_record_that_comes_late_is_waited_for() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled())
    ledger.ended(attempt, 200, 1.0)
    ledger.settle_late(1.1)
    assert not attempt.settled
    ledger.delivered(PULLED)
    ledger.settle_late(1.2)
    assert reason(attempt) is MissReason.NONE
    ledger.settle_late(100.0)
    assert ledger.sums.settled == 1


def test_a_record_that_never_comes_makes_the_reason_unknown() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled())
    ledger.ended(attempt, 200, 1.0)
    ledger.settle_late(1.0 + UNREPORTED_SECONDS)
    assert reason(attempt) is MissReason.UNKNOWN


def test_the_end_of_a_later_attempt_settles_those_whose_records_did_not_come() -> None:
    ledger = Ledger(10)
    waiting, other = opened(ledger, pulled()), opened(ledger, pulled(12))
    ledger.ended(waiting, 200, 1.0)
    ledger.delivered(replace(PULLED, tag=12))
    ledger.ended(other, 200, 1.0 + UNREPORTED_SECONDS)
    assert (reason(waiting), reason(other)) == (MissReason.UNKNOWN, MissReason.NONE)


def test_a_client_that_leaves_before_anything_is_computed_is_no_loss_of_a_cache() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled())
    ledger.ended(attempt, LEFT_STATUS, 1.0)
    ledger.delivered(Delivery(tag=11, arrived_ns=3, prompt_tokens=1000))
    ledger.settle_late(1.1)
    assert reason(attempt) is MissReason.LEFT


def test_a_client_that_leaves_while_its_answer_runs_is_judged_like_any_other() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled())
    ledger.delivered(replace(PULLED, peer_tokens=0, computed_tokens=1000))
    ledger.ended(attempt, LEFT_STATUS, 1.0)
    assert reason(attempt) is MissReason.UNKNOWN
    assert counted(ledger.sums.lost_tokens) == {"unknown": 800}


def test_an_attempt_whose_replica_was_lost_is_retried_and_both_are_kept_under_the_request() -> None:
    ledger = Ledger(10)
    first = opened(ledger, pulled())
    ledger.ended(first, LOST_STATUS, 1.0)
    assert reason(first) is MissReason.RETRIED
    second = opened(ledger, pulled(12, replica="c"))
    assert ledger.attempts("r1") == (first, second)
    assert not second.settled


def test_a_refused_request_and_a_replica_without_a_table_wait_for_no_record() -> None:
    ledger = Ledger(10)
    refused = opened(ledger, pulled())
    ledger.ended(refused, 400, 1.0)
    assert reason(refused) is MissReason.NONE
    plain = opened(ledger, pulled(12, reports=False))
    ledger.ended(plain, 200, 1.0)
    assert reason(plain) is MissReason.OFF


def test_several_prompts_are_summed_and_the_longest_is_judged() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled())
    ledger.delivered(Delivery(tag=11, scheduled_ns=1, first_token_ns=2, prompt_tokens=40, computed_tokens=40))
    ledger.delivered(PULLED)
    ledger.ended(attempt, 200, 1.0)
    assert reason(attempt) is MissReason.NONE
    assert (ledger.sums.peer_tokens, ledger.sums.computed_tokens) == (800, 240)


def test_attempts_are_bounded_in_all_and_under_one_id() -> None:
    ledger = Ledger(100)
    for tag in range(1, 300):
        ledger.open(pulled(tag, request_id=f"r{tag}"))
    assert len(ledger) == 100
    assert ledger.attempts("r199") == ()
    assert len(ledger.attempts("r200")) == 1
    assert ledger.sums.dropped == 199
    for tag in range(1000, 1000 + 3 * ATTEMPTS_KEPT):
        ledger.open(pulled(tag, request_id="same"))
    assert len(ledger.attempts("same")) == ATTEMPTS_KEPT


def test_a_forgotten_attempt_still_counts_and_is_not_waited_for() -> None:
    ledger = Ledger(1)
    attempt = opened(ledger, pulled())
    ledger.open(pulled(12))
    ledger.ended(attempt, 200, 1.0)
    assert reason(attempt) is MissReason.UNKNOWN
    ledger.settle_late(1e9)
    assert ledger.sums.settled == 1


def test_an_attempt_that_is_forgotten_while_its_record_is_waited_for_is_settled() -> None:
    ledger = Ledger(1)
    attempt = opened(ledger, pulled())
    ledger.ended(attempt, LEFT_STATUS, 1.0)
    ledger.open(pulled(12))
    ledger.settle_late(1.1)
    assert reason(attempt) is MissReason.LEFT
    assert (ledger.sums.settled, ledger.sums.dropped) == (1, 1)


def test_records_of_others_are_counted_and_those_without_a_tag_are_not_ours() -> None:
    ledger = Ledger(1)
    ledger.delivered(Delivery(tag=99))
    ledger.delivered(Delivery())
    assert ledger.sums.unmatched_deliveries == 1


def test_a_record_that_comes_after_its_attempt_was_settled_is_shown_and_counts() -> None:
    ledger = Ledger(10)
    attempt = opened(ledger, pulled())
    ledger.delivered(PULLED)
    ledger.ended(attempt, 200, 1.0)
    ledger.delivered(replace(PULLED, prompt_tokens=40, peer_tokens=0, computed_tokens=40))
    assert [delivery.prompt_tokens for delivery in attempt.deliveries] == [1000, 40]
    assert (ledger.sums.settled, ledger.sums.computed_tokens) == (1, 240)
