"""Makes a new fleet state whenever the replicas or their tables changed: the one place that compares."""

from collections.abc import Callable, Mapping

from engine.fleet import FleetSnapshot, FleetView
from gateway.block_registry.fleet_state import EMPTY, Epoch, FleetState, make_state
from gateway.block_registry.tables import Table, Tables

HOLD_SECONDS = 0.02
"""How long a gateway takes what it knows of the fleet and its tables for true before it asks the kernel again."""

Listener = Callable[[FleetState], None]


class FleetWatch:
    """Belongs to one thread, as the tables do. Without `imports` nobody imports from anybody."""

    def __init__(self, fleet: FleetView, tables: Tables, *, imports: bool = True) -> None:
        self._fleet = fleet
        self._tables = tables
        self._imports = imports
        self._found: Mapping[str, Table] = {}
        self._refused: set[tuple[Epoch, Epoch]] = set()
        self._listeners: list[Listener] = []
        self.latest: FleetState = EMPTY
        """As last made, at no cost; owners of its tables may have died since."""

    def on_change(self, listener: Listener) -> None:
        """Also tell `listener` of each state whose replicas or tables differ from the one before."""
        self._listeners.append(listener)

    def now(self) -> FleetState:
        """Return the state of the fleet, the latest one if nothing changed. Raises FleetError as the fleet's view does."""
        snapshot, latest = self._fleet.snapshot(), self.latest
        changed = snapshot is not latest.snapshot and snapshot != latest.snapshot
        tables = self._tables.tables(anew=changed)  # a replica that has just become ready has a table since just now
        if changed or tables != self._found:
            self._make(snapshot, dict(tables))
            for listener in self._listeners:
                listener(self.latest)
        return self.latest

    def refused(self, importer: str, source: str) -> None:
        """Record that the importer's engine does not read the source, a replica or a tier, until one of them is restarted."""
        latest = self.latest
        ours, theirs = latest.tables.get(importer), latest.tables.get(source) or latest.tiers.get(source)
        if ours is not None and theirs is not None:
            self._refused.add(((importer, ours.epoch), (source, theirs.epoch)))
            self._make(latest.snapshot, self._found)

    def _make(self, snapshot: FleetSnapshot, tables: Mapping[str, Table]) -> None:
        self._found = tables
        live = {(name, table.epoch) for name, table in tables.items()}
        self._refused = {pair for pair in self._refused if live.issuperset(pair)}
        self.latest = make_state(snapshot, tables, self._refused, imports=self._imports)
