"""Keeps the planner's parity verdict up to date: a check once a replica is ready, another when that one was replaced."""

import asyncio
import logging

from engine.fleet import FleetSnapshot, FleetView
from gateway.parity import ParityCheckFailed, ParityVerdict, check_parity
from gateway.planner import Planner
from gateway.tokens import TokenService

_logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0


class ParityWatch:
    """Run it as a task. Without a verdict completions go as text, so nothing waits for it."""

    def __init__(
        self,
        fleet: FleetView,
        planner: Planner,
        tokens: TokenService,
        *,
        poll_seconds: float = POLL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._fleet = fleet
        self._planner = planner
        self._tokens = tokens
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds
        self._checked: tuple[str, int | None] | None = None

    async def run(self) -> None:
        """Watch until cancelled. Raises FleetError when the fleet can not be read."""
        while True:
            pause = self._poll_seconds
            snapshot = self._fleet.snapshot()
            self._forget_what_is_gone(snapshot)
            if self._checked is None and snapshot.ready() and not await self._check(snapshot):
                pause = self._retry_seconds
            await asyncio.sleep(pause)

    def _forget_what_is_gone(self, snapshot: FleetSnapshot) -> None:
        """Drop the verdict when the replica that was asked is another process now, or none."""
        if self._checked is not None and self._checked not in [(r.name, r.pid) for r in snapshot.replicas]:
            _logger.info("%s was replaced: token ids are compared anew", self._checked[0])
            self._checked = None
            self._planner.parity = ParityVerdict()

    async def _check(self, snapshot: FleetSnapshot) -> bool:
        replica = snapshot.ready()[0]
        counts = self._planner.parity_counts
        counts.checks += 1
        model = snapshot.served_model_name or snapshot.model
        try:
            verdict = await check_parity(self._tokens, replica.name, replica.socket, model)
        except ParityCheckFailed as error:
            counts.failures += 1
            _logger.warning("token ids were not compared with %s: %s", replica.name, error)
            return False
        counts.differences += verdict.differences
        self._planner.parity = verdict
        self._checked = (replica.name, replica.pid)
        return True
