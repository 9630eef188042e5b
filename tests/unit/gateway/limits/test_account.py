"""An account's charges: where they are counted if the time that comes with them is older than the account is already."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.limits.account import Account
from gateway.limits.windows import WINDOW_SECONDS

START = 20_000 * 86400.0 - 90
"""Shortly before a day ends."""

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("time"), st.floats(0, 70)),
        st.tuples(st.just("set back"), st.floats(0, 70)),
        st.tuples(st.just("charge"), st.floats(0, 200)),
    ),
    max_size=40,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_a_charge_whose_time_is_over_counts_as_one_of_now(steps: list[tuple[str, float]]) -> None:
    late, timely, now = Account(), Account(), START
    for each in (late, timely):
        each.roll(now)
    for what, amount in steps:
        if what == "charge":
            assert late.charge(3, now - amount) == timely.charge(3, now) == int(now)
        else:
            now = now + amount if what == "time" else now - amount
            for each in (late, timely):
                each.roll(now)
        window = late.state.tokens
        assert late.state == timely.state
        assert window.total == sum(window.slots.values())
        assert list(window.slots) == sorted(window.slots)
        assert all(int(now) - WINDOW_SECONDS <= second <= window.newest <= int(now) for second in window.slots)
