"""Keeps the prompt reader's parity verdict up to date.

It checks once a replica is ready, again when that replica is replaced, and from time to time, taking turns among the replicas:
an engine's tokenizer or template may change, or differ from its neighbours'.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from engine.fleet import FleetSnapshot, FleetView, Replica
from gateway.prompts.parity import Parity, ParityCheckFailed, ParityVerdict, check_parity
from gateway.prompts.prompt_reader import PromptReader
from gateway.prompts.tokenizer.service import TokenService

_logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
RETRY_SECONDS = 5.0


class ParityWatch:
    """Run it as a task. Without a verdict completions go as text, so nothing waits for it.

    The comparison is repeated `interval_seconds` after the last one, or never for 0. If it fails, the verdict stays.
    """

    def __init__(
        self,
        fleet: FleetView,
        prompts: PromptReader,
        tokens: TokenService,
        *,
        interval_seconds: float = 0.0,
        poll_seconds: float = POLL_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._prompts = prompts
        self._tokens = tokens
        self._interval_seconds = interval_seconds
        self._poll_seconds = poll_seconds
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._checked: tuple[str, int | None] | None = None
        self._last_asked = ""
        self._next_at = 0.0

    async def run(self) -> None:
        """Watch until cancelled. Raises FleetError if the fleet cannot be read."""
        while True:
            pause = self._poll_seconds
            snapshot = self._fleet.snapshot()
            self._forget_what_is_gone(snapshot)
            if self._is_due() and snapshot.ready() and not await self._check(snapshot):
                pause = self._retry_seconds
            await asyncio.sleep(pause)

    def _is_due(self) -> bool:
        return self._checked is None or (self._interval_seconds > 0 and self._clock() >= self._next_at)

    def _forget_what_is_gone(self, snapshot: FleetSnapshot) -> None:
        """Drop the verdict if the replica that was asked is now another process, or gone."""
        if self._checked is not None and self._checked not in [(r.name, r.pid) for r in snapshot.replicas]:
            _logger.info("%s was replaced: comparing token ids again", self._checked[0])
            self._checked = None
            self._prompts.parity = ParityVerdict()

    async def _check(self, snapshot: FleetSnapshot) -> bool:
        replica = self._next_replica(snapshot)
        counts = self._prompts.parity_counts
        counts.checks += 1
        model = snapshot.served_model_name or snapshot.model
        try:
            verdict = await check_parity(self._tokens, replica.name, replica.socket, model)
        except ParityCheckFailed as error:
            counts.failures += 1
            _logger.warning("token ids were not compared with %s: %s", replica.name, error)
            return False
        counts.differences_found += verdict.differences
        counts.changes += self._tell_of_change(self._prompts.parity, verdict)
        self._prompts.parity = verdict
        self._checked = (replica.name, replica.pid)
        self._next_at = self._clock() + self._interval_seconds
        return True

    def _next_replica(self, snapshot: FleetSnapshot) -> Replica:
        """Return the ready replica after the one that was asked last."""
        ready = snapshot.ready()
        names = [replica.name for replica in ready]
        place = names.index(self._last_asked) + 1 if self._last_asked in names else 0
        found = ready[place % len(ready)]
        self._last_asked = found.name
        return found

    @staticmethod
    def _tell_of_change(before: ParityVerdict, after: ParityVerdict) -> bool:
        """Log what changed; before the first verdict there was nothing."""
        changed = False
        kinds = (("completions", before.completions, after.completions), ("chats", before.chat, after.chat))
        for kind, old, new in kinds:
            if old.parity not in (new.parity, Parity.UNKNOWN):
                changed = True
                why = f": {new.reason}" if new.reason else ""
                _logger.warning("token ids of %s were %s, are %s by %s%s", kind, old.parity, new.parity, after.replica, why)
        return changed
