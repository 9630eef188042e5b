"""What is learnt from: everything below the rate, an even part of what comes faster."""

from itertools import pairwise

import pytest

from gateway.steering.costs.sampling import BURST_SECONDS, RATE_MAX, Sampling


def taken(times: list[float]) -> list[float]:
    sampling = Sampling()
    return [time for time in times if sampling.takes(time)]


@pytest.mark.parametrize("rate", [1, 20, RATE_MAX])
def test_below_the_rate_nothing_is_left_out(rate: float) -> None:
    times = [1000 + place / rate for place in range(1000)]
    assert taken(times) == times


def test_a_burst_within_the_rate_is_taken_whole_also_out_of_order() -> None:
    burst = [1000 - place * 0.0001 for place in range(int(RATE_MAX * BURST_SECONDS))]
    times = [*burst, *(time + BURST_SECONDS + 1 for time in burst)]
    assert taken(times) == times


def test_what_is_heard_of_late_is_taken_like_the_rest() -> None:
    times = [1000 + place / 50 - (30 if place % 3 == 0 else 0) for place in range(1000)]
    assert taken(times) == times


@pytest.mark.parametrize("faster", [2, 10, 37])
def test_of_what_comes_faster_the_rate_is_taken_evenly(faster: int) -> None:
    times = [1000 + place / RATE_MAX / faster for place in range(int(RATE_MAX) * faster * 10)]
    found = [time for time in taken(times) if time >= 1000 + 3 * BURST_SECONDS]
    assert len(found) == pytest.approx(7 * RATE_MAX, rel=0.01)
    gaps = [after - before for before, after in pairwise(found)]
    assert max(gaps) <= 2 / RATE_MAX
