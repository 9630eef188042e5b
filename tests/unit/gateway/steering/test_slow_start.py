from gateway.steering.slow_start import SlowStart

NAMES = ("a", "b", "c")


def taking(slow: SlowStart, now: float, **in_flight: int) -> list[str]:
    return list(slow.takers(NAMES, now, lambda: in_flight))


def test_while_nobody_starts_slowly_the_same_names_come_back() -> None:
    slow = SlowStart(10.0)
    assert slow.takers(NAMES, 5.0, dict) is NAMES
    slow.began("a", 0.0)
    assert slow.takers(NAMES, 10.0, dict) is NAMES


def test_a_restarted_replica_gets_a_growing_share_of_what_others_have() -> None:
    slow = SlowStart(10.0)
    slow.began("a", 0.0)
    assert taking(slow, 0.0, a=0, b=20, c=20) == ["a", "b", "c"]
    assert taking(slow, 0.0, a=2, b=20, c=20) == ["b", "c"]  # a tenth
    assert taking(slow, 5.0, a=9, b=20, c=20) == ["a", "b", "c"]
    assert taking(slow, 5.0, a=10, b=20, c=20) == ["b", "c"]
    assert taking(slow, 10.0, a=50, b=20, c=20) == ["a", "b", "c"]


def test_one_request_at_a_time_it_always_gets() -> None:
    slow = SlowStart(10.0)
    slow.began("a", 0.0)
    assert taking(slow, 0.0) == ["a", "b", "c"]
    assert taking(slow, 0.0, a=1) == ["b", "c"]


def test_if_all_start_slowly_nobody_does() -> None:
    slow = SlowStart(10.0)
    for name in NAMES:
        slow.began(name, 0.0)
    assert slow.takers(NAMES, 1.0, lambda: {"a": 100}) is NAMES


def test_with_no_seconds_nobody_starts_slowly() -> None:
    slow = SlowStart(0.0)
    slow.began("a", 0.0)
    assert slow.takers(NAMES, 0.0, lambda: {"a": 100}) is NAMES
