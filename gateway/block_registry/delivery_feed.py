"""The engines' delivery records, read from their tables as they appear, each record once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gateway.block_registry.tables import Table
from transport.table.deliveries import Delivery


class Taker(Protocol):
    """Receives what the named replica delivered."""

    def __call__(self, replica: str, table: Table, delivery: Delivery) -> None: ...


@dataclass(slots=True)
class _Place:
    table: Table
    after: int = 0


class DeliveryFeed:
    """Belongs to the tables' thread. A replica's last table is kept, so that its final records can still be read.

    `missed` counts records that were overwritten before they were read.
    """

    def __init__(self) -> None:
        self._places: dict[str, _Place] = {}
        self._takers: list[Taker] = []
        self.missed = 0

    def add(self, taker: Taker) -> None:
        """Also pass every further record to `taker`."""
        self._takers.append(taker)

    def poll(self, replica: str) -> None:
        """Pass on what `replica` delivered since the last call; takes a few microseconds if there is nothing."""
        place = self._places.get(replica)
        if place is not None:
            self._read(replica, place)

    def waits(self, replica: str, tag: int) -> bool:
        """Return whether the request with this tag waits, or waited when its engine ended, for its first step."""
        place = self._places.get(replica)
        return place is not None and place.table.waits(tag)

    def refresh(self) -> None:
        """Pass on everything new."""
        for replica, place in self._places.items():
            newest, found = place.table.deliveries(place.after)
            if newest != place.after:
                self._hand_on(replica, place, newest, found)

    def watch(self, tables: Mapping[str, Table]) -> None:
        """Read these too from now on; the last records of a table that is replaced are passed on first."""
        for replica, table in tables.items():
            place = self._places.get(replica)
            if place is None or place.table is not table:
                if place is not None:
                    self._read(replica, place)
                self._places[replica] = _Place(table)

    def _read(self, replica: str, place: _Place) -> None:
        newest, found = place.table.deliveries(place.after)
        if newest != place.after:
            self._hand_on(replica, place, newest, found)

    def _hand_on(self, replica: str, place: _Place, newest: int, found: list[Delivery]) -> None:
        missed = newest - place.after - len(found)
        if missed > 0:
            self.missed += missed
        place.after = newest
        table = place.table
        for delivery in found:
            for take in self._takers:
                take(replica, table, delivery)
