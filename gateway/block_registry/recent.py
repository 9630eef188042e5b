"""The fleet and the tables as of a moment ago: asking the kernel costs more than everything else about them.

A gateway looks at both several times per request, thousands of times a second. A state a few milliseconds old is as good as a
fresh one: a replica may die at any moment after it was looked at anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from engine.fleet import FleetSnapshot, FleetView
from gateway.block_registry.tables import Table, Tables

RECENT_SECONDS = 0.02

Clock = Callable[[], float]


class RecentFleet:
    """A view of the fleet that queries another one at most once in RECENT_SECONDS."""

    def __init__(self, fleet: FleetView, clock: Clock = time.monotonic) -> None:
        self._fleet = fleet
        self._clock = clock
        self._until = 0.0
        self._snapshot: FleetSnapshot | None = None

    def snapshot(self) -> FleetSnapshot:
        """Return the state of a moment ago. Raises what the other view raises."""
        now = self._clock()
        if self._snapshot is None or now >= self._until:
            self._snapshot = self._fleet.snapshot()
            self._until = now + RECENT_SECONDS
        return self._snapshot

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        """A connection to `name` failed: what is known about it is out of date."""
        self._snapshot = None
        self._fleet.suspect(name, overdue=overdue)


class RecentTables:
    """Tables that query others at most once in RECENT_SECONDS."""

    def __init__(self, tables: Tables, clock: Clock = time.monotonic) -> None:
        self._source = tables
        self._clock = clock
        self._until = 0.0
        self._tables: Mapping[str, Table] | None = None

    def tables(self) -> Mapping[str, Table]:
        """Return the live tables of a moment ago."""
        now = self._clock()
        if self._tables is None or now >= self._until:
            self._tables = self._source.tables()
            self._until = now + RECENT_SECONDS
        return self._tables
