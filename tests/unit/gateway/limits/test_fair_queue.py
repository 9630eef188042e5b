"""Turns: equal shares for tenants, classes in order, and a place for those that have few waiting."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.limits.fair_queue import QUANTUM_TOKENS, TOKENS_MIN, FairQueue

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
HIGH, NORMAL, LOW = range(3)
TOKENS_MAX = 50 * QUANTUM_TOKENS


def put(queue: FairQueue, tenant: str, rank: int = NORMAL, tokens: int = 100) -> int:
    place = queue.put(tenant, rank, tokens)
    assert place is not None
    return place.number


@PATIENT
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, TOKENS_MAX)), min_size=1, max_size=200))
def test_tenants_that_wait_get_the_same_number_of_tokens(requests: list[tuple[str, int]]) -> None:
    queue, waiting, tokens_of = FairQueue(1000), Counter(), {}
    for tenant, tokens in requests:
        tokens_of[put(queue, tenant, NORMAL, tokens)] = (tenant, max(tokens, TOKENS_MIN))
        waiting[tenant] += 1
    got, taken = Counter(dict.fromkeys(waiting, 0)), []
    while all(waiting.values()):
        number = queue.take()
        assert number is not None
        tenant, tokens = tokens_of[number]
        taken.append(number)
        got[tenant] += tokens
        waiting[tenant] -= 1
        assert max(got.values()) - min(got.values()) <= TOKENS_MAX + 2 * QUANTUM_TOKENS
    rest = [number for _ in range(len(queue)) if (number := queue.take()) is not None]
    assert sorted(taken + rest) == sorted(tokens_of)
    assert queue.take() is None
    for tenant in waiting:
        own = [number for number in taken + rest if tokens_of[number][0] == tenant]
        assert own == sorted(own)


def test_a_tenant_of_many_small_requests_does_not_wait_for_one_of_large_ones() -> None:
    queue = FairQueue(1000)
    large = {put(queue, "large", tokens=100_000) for _ in range(5)}
    small = [put(queue, "small", tokens=100) for _ in range(100)]
    first = [queue.take() for _ in range(50)]
    assert not large.intersection(first)
    assert first == small[:50]


def test_a_class_goes_before_those_behind_it() -> None:
    queue = FairQueue(10)
    low, normal, high = put(queue, "a", LOW), put(queue, "a", NORMAL), put(queue, "b", HIGH)
    assert [queue.take() for _ in range(3)] == [high, normal, low]


def test_in_a_full_queue_the_tenant_with_most_waiting_gives_way() -> None:
    queue = FairQueue(4)
    put(queue, "flood", NORMAL)
    last_of_low = [put(queue, "flood", LOW) for _ in range(3)][-1]
    assert queue.put("flood", LOW, 1) is None
    place = queue.put("quiet", LOW, 1)
    assert place is not None
    assert place.displaced == last_of_low
    assert len(queue) == 4
    assert queue.put("other", LOW, 1) is not None
    assert queue.put("quiet", LOW, 1) is None


def test_one_that_left_takes_no_turn() -> None:
    queue = FairQueue(4)
    first, second = put(queue, "a"), put(queue, "a")
    assert queue.remove(first)
    assert not queue.remove(first)
    assert queue.take() == second
    assert not queue.remove(second)
    assert len(queue) == 0


def test_how_many_go_first_is_known_about() -> None:
    queue = FairQueue(100)
    for _ in range(50):
        put(queue, "flood")
    assert queue.ahead_of("quiet", NORMAL) == 1
    put(queue, "quiet")
    assert queue.ahead_of("quiet", NORMAL) == 3
    assert queue.ahead_of("flood", NORMAL) == 51


def test_a_class_gives_way_to_those_before_it_and_not_to_those_behind() -> None:
    queue = FairQueue(2)
    put(queue, "a", HIGH)
    low = put(queue, "b", LOW)
    place = queue.put("a", HIGH, 1)
    assert place is not None
    assert place.displaced == low
    assert queue.put("c", NORMAL, 1) is None


def test_classes_behind_are_not_ahead() -> None:
    queue = FairQueue(100)
    for tenant in "abc":
        put(queue, tenant, LOW)
        put(queue, tenant, HIGH)
    assert [queue.ahead_of("d", rank) for rank in (HIGH, NORMAL, LOW)] == [3, 3, 6]


def test_a_queue_without_places_takes_nobody() -> None:
    assert FairQueue(0).put("a", HIGH, 1) is None
