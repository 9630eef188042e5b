"""Tells other nodes of this one: its replicas, its tables and what changes in them, to whoever subscribes."""

import asyncio
import time

from engine.fleet import FileFleet, FleetError, FleetSnapshot
from engine.node.streams import send
from transport.node.changes import Changes
from transport.node.decoding import Decoder
from transport.node.messages import Beat, FleetTold, ReplicaTold
from transport.table.directory import TableDirectory

TICK_SECONDS = 0.01
"""Between two looks for deliveries, which are told at once: somebody waits for them with the first token in hand."""
TICKS = 5
"""Of these from one round of changes to the next."""


class Teller:
    """What one subscriber is told. `tables` and `fleet` are shared by all of them: one thread. Blocks that lie coded are told
    once `decoder` is ready."""

    def __init__(self, tables: TableDirectory, fleet: FileFleet, decoder: Decoder, writer: asyncio.StreamWriter) -> None:
        self._tables = tables
        self._fleet = fleet
        self._writer = writer
        self._changes = Changes(decodes=lambda: decoder.ready)
        self._told: FleetTold | None = None

    async def run(self) -> None:
        """Tell all there is and then what changes, until the subscriber is gone. Raises NodeError then."""
        while True:
            tables = self._tables.tables()
            fleet = self._fleet_told()
            if fleet != self._told:
                self._told = fleet
                await send(self._writer, fleet)
            await send(self._writer, Beat(time.monotonic_ns()))
            for message in list(self._changes.round(tables)):
                await send(self._writer, message)
            for _ in range(TICKS):
                await asyncio.sleep(TICK_SECONDS)
                if self._changes.delivered(self._tables.tables()):
                    break

    def _fleet_told(self) -> FleetTold:
        try:
            return _told(self._fleet.snapshot())
        except FleetError:  # it is being replaced by another release's
            return FleetTold()


def _told(snapshot: FleetSnapshot) -> FleetTold:
    return FleetTold(
        snapshot.model,
        snapshot.served_model_name,
        snapshot.vllm_args,
        tuple(ReplicaTold(r.name, r.state.value, r.restarts, r.reason[:4000], r.device) for r in snapshot.replicas),
    )
