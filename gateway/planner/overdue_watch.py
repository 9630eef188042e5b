"""Finds replicas that hold requests far beyond their expected time without a sign of life, and moves these requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection

from engine.fleet import FleetError, FleetView
from gateway.planner.planner import Planner
from gateway.steering.overdue import overdue_seconds

LOOK_SECONDS = 0.5

_logger = logging.getLogger(__name__)


class OverdueWatch:
    """`give_up` is told whose requests, as far as nothing of an answer came yet, are to ask another replica, and why.

    A replica without a block table is not judged: nobody knows its steps. Belongs to the event loop's thread.
    """

    def __init__(
        self,
        planner: Planner,
        fleet: FleetView,
        give_up: Callable[[str, str], int],
        *,
        seconds_min: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._planner = planner
        self._fleet = fleet
        self._give_up = give_up
        self._seconds_min = seconds_min
        self._clock = clock
        self._known: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Look at intervals; never returns."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self.look()
            except FleetError as error:  # fleet.json is being replaced by another version's
                _logger.warning("no look at overdue requests: %s", error)

    def look(self) -> None:
        """Find those replicas now, and report them."""
        now, planner = self._clock(), self._planner
        tables = planner.fleet.now().tables
        found: dict[str, str] = {}
        for name, waiting in planner.waiting().items():
            table = tables.get(name)
            if table is None:
                continue
            seconds = overdue_seconds(waiting, table.heartbeat_ns() / 1e9, now, self._seconds_min)
            if seconds:
                whom = "one request" if len(waiting) == 1 else f"{len(waiting)} requests"
                found[name] = f"it gives no sign of life to {whom} for {seconds:.0f} s"
        for name in sorted(found.keys() - self._known):
            _logger.warning("%s is suspect: %s", name, found[name])
        self._known = frozenset(found)
        planner.overdue(found)
        takers = self._takers(found)
        for name, why in found.items():
            self._fleet.suspect(name, overdue=True)
            if takers:
                self._give_up(name, why)

    def _takers(self, found: Collection[str]) -> Collection[str]:
        if not found:
            return ()
        ready = [replica.name for replica in self._fleet.snapshot().ready()]
        return [name for name in self._planner.outliers.takers(ready, self._clock()) if name not in found]
