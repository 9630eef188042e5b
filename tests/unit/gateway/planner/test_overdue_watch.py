"""What is said of replicas that hold requests far beyond their expected time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.planner.overdue_watch import OverdueWatch


class StillPlanner:
    """One replica that made its last step at 100 s, with so many requests since."""

    def __init__(self, waiting: int) -> None:
        table = SimpleNamespace(heartbeat_ns=lambda: int(100e9))
        self.fleet = SimpleNamespace(now=lambda: SimpleNamespace(tables={"a": table}))
        self.outliers = SimpleNamespace(takers=lambda ready, now: ready)
        self._waiting = [SimpleNamespace(decided_at=100.0, expected_seconds=0.1)] * waiting
        self.told: dict[str, str] = {}

    def waiting(self) -> dict[str, list[SimpleNamespace]]:
        return {"a": self._waiting}

    def overdue(self, why: dict[str, str]) -> None:
        self.told = why


@pytest.mark.parametrize(("waiting", "whom"), [(1, "one request"), (2, "2 requests")])
def test_one_request_is_not_told_of_as_many(waiting: int, whom: str) -> None:
    planner: Any = StillPlanner(waiting)
    fleet: Any = SimpleNamespace(snapshot=lambda: SimpleNamespace(ready=tuple), suspect=lambda name, *, overdue: None)
    OverdueWatch(planner, fleet, lambda name, why: 0, seconds_min=5.0, clock=lambda: 109.0).look()
    assert planner.told == {"a": f"it gives no sign of life to {whom} for 9 s"}
