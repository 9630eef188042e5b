"""Keeps the index of blocks filled while no request does: the first one after a quiet hour finds it so."""

import asyncio
import logging

from engine.fleet import FleetError
from gateway.block_registry.fleet_watch import FleetWatch
from gateway.block_registry.registry import Registry

KEEP_SECONDS = 0.05

_logger = logging.getLogger(__name__)


class IndexKeeper:
    """Belongs to the event loop's thread, as the tables do."""

    def __init__(self, fleet: FleetWatch, registry: Registry) -> None:
        self._fleet = fleet
        self._registry = registry

    async def run(self) -> None:
        """Take in what changes, for ever; between two pieces of a table everything else has its turn."""
        while True:
            more = False
            try:
                more = self._registry.keep_up(self._fleet.now())
            except FleetError as error:  # fleet.json is being replaced by another version's
                _logger.debug("the index waits: %s", error)
            await asyncio.sleep(0 if more else KEEP_SECONDS)
