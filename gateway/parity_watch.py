"""Keeps the planner's parity verdict up to date: a check once a replica is ready, another when that one was replaced."""

import asyncio
import logging

from engine.fleet import FleetSnapshot, FleetView, Replica
from gateway.parity import ParityCheckFailed, check_parity
from gateway.planner import Planner
from gateway.tokens import TokenService

_logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0


class ParityWatch:
    """Run it as a task. Until its first verdict completions go as text, so nothing waits for it."""

    def __init__(self, fleet: FleetView, planner: Planner, tokens: TokenService, *, poll_seconds: float = POLL_SECONDS) -> None:
        self._fleet = fleet
        self._planner = planner
        self._tokens = tokens
        self._poll_seconds = poll_seconds
        self._checked: tuple[str, int | None] | None = None
        self.checks = 0
        self.failures = 0

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            pause = self._poll_seconds
            snapshot = self._fleet.snapshot()
            replica = self._unchecked(snapshot)
            if replica is not None and not await self._check(snapshot, replica):
                pause = max(RETRY_SECONDS, pause)
            await asyncio.sleep(pause)

    def _unchecked(self, snapshot: FleetSnapshot) -> Replica | None:
        """Return the replica to ask, None while the one that was asked last is still the same process."""
        ready = snapshot.ready()
        if not ready or self._checked in [(replica.name, replica.pid) for replica in snapshot.replicas]:
            return None
        return ready[0]

    async def _check(self, snapshot: FleetSnapshot, replica: Replica) -> bool:
        self.checks += 1
        model = snapshot.served_model_name or snapshot.model
        try:
            self._planner.parity = await check_parity(self._tokens, replica.name, replica.socket, model)
        except ParityCheckFailed as error:
            self.failures += 1
            _logger.warning("token ids were not compared with %s: %s", replica.name, error)
            return False
        self._checked = (replica.name, replica.pid)
        return True
