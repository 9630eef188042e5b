"""When a node is called, or its network measured, again."""

import itertools
from types import SimpleNamespace

import pytest

from engine.node import following as module
from engine.node.following import MEASURE_SECONDS_MAX, Following, next_pause


def test_pauses_double_up_to_a_bound_and_begin_anew_after_what_held_for_long() -> None:
    pauses = [0.0]
    for _ in range(6):
        pauses.append(next_pause(pauses[-1], 1.0, 0.25, 5.0))
    assert pauses[1:] == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0]
    assert next_pause(5.0, 5.0, 0.25, 5.0) == 5.0
    assert next_pause(5.0, 5.1, 0.25, 5.0) == 0.25


class End(Exception):
    """The clock ran out."""


async def test_a_way_that_fails_after_it_held_for_long_is_measured_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    now, measured = 0.0, []
    holds = [0.0] * 12 + [MEASURE_SECONDS_MAX + 1, 1e9, 0.0]
    """How long the way holds that is chosen by each measurement."""

    class Ways:
        until = 0.0

        @property
        def settled(self) -> bool:
            return now < self.until

    ways = Ways()

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def measure(_: Following, measured_ways: Ways) -> None:
        if len(measured) == len(holds):
            raise End
        measured_ways.until = now + holds[len(measured)]
        measured.append(now)

    monkeypatch.setattr(module, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Following, "_measure", measure)
    with pytest.raises(End):
        await Following._choose(Following.__new__(Following), ways)
    pauses = [later - before for before, later in itertools.pairwise(measured)]
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[10:12] == [600, 600]
    assert pauses[13] == pytest.approx(module.MEASURED_SECONDS_MAX + module.MEASURE_SECONDS, abs=module.LOOK_SECONDS)
    assert pauses[12] == pytest.approx(MEASURE_SECONDS_MAX + 1 + module.MEASURE_SECONDS, abs=module.LOOK_SECONDS)
