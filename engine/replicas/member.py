"""One replica as the supervisor sees it, and what people are told about it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from engine.fleet import Replica, ReplicaState
from engine.host_process.logs import log_lines, log_size
from engine.host_process.messages import Spawn
from engine.replicas.core_watch import CoreWatch
from engine.replicas.health import HealthProbe
from engine.replicas.launch import EngineSettings, ReplicaLaunch
from engine.replicas.lifecycle import Lifecycle

STARTING_POLL_SECONDS = 0.2
DOUBT_POLL_SECONDS = 0.5  # after a failed check


class Member:
    """A replica's start, life and health; `look` is set to have it checked at once."""

    def __init__(self, launch: ReplicaLaunch, settings: EngineSettings) -> None:
        self.launch = launch
        self.life = Lifecycle(settings)
        self.probe = HealthProbe(launch.socket, settings.health_timeout_seconds)
        self.core = CoreWatch()
        self.look = asyncio.Event()
        self.overdue_until = 0.0  # of the event loop's clock: until then requests of it are known to be overdue
        self._interval_seconds = settings.health_interval_seconds
        self._log_bytes_max = settings.log_bytes_max
        self._host_memory = (settings.host_memory_bytes_each, str(settings.host_memory_dir or ""))
        self._log_start = 0

    @property
    def name(self) -> str:
        """The replica's name."""
        return self.launch.name

    def seen(self) -> Replica:
        """The replica as the front door sees it."""
        life, at = self.life, self.launch
        return Replica(at.name, life.state, at.socket, life.pid, life.restarts, life.reason, at.device, at.log)

    def spawn_command(self) -> Spawn:
        """Return the command to start it; what it logs from here on belongs to this run."""
        at = self.launch
        self._log_start = log_size(Path(at.log))
        return Spawn(at.name, at.argv, at.env, at.socket, at.scratch, at.log, self._log_bytes_max, *self._host_memory)

    def run_log(self) -> list[str]:
        """Return the last lines that this run logged."""
        return log_lines(Path(self.launch.log), self._log_start)

    def poll_seconds(self) -> float | None:
        """Seconds until its next health check; None if only `look` triggers one."""
        if not self.life.watched:
            return None
        if self.life.state is ReplicaState.STARTING:
            return STARTING_POLL_SECONDS
        return DOUBT_POLL_SECONDS if self.life.in_doubt else self._interval_seconds


def narrate(before: Replica, after: Replica, wait_seconds: float = 0.0) -> Iterator[str]:
    """Yield lines for people about what changed in a replica; one that ended is started again after `wait_seconds`."""
    if after.state is ReplicaState.BACKOFF:
        if after.pid is None and (before.state is not ReplicaState.BACKOFF or before.pid is not None):
            when = f" in {round(wait_seconds, 1):g} s" if wait_seconds >= 0.05 else ""
            yield f"{after.name} ended: {after.reason}; it starts again{when}"
        return
    if after.state is before.state:
        return
    match after.state:
        case ReplicaState.STARTING:
            yield f"{after.name}: starting on {after.device}, log {after.log}"
        case ReplicaState.READY | ReplicaState.STOPPED:
            yield f"{after.name}: {after.state}"
        case ReplicaState.FAILED if before.state is ReplicaState.STARTING and not after.restarts:
            yield f"{after.name}: {after.state}, log {after.log}"  # whoever waits for the start says why, once
        case ReplicaState.DRAINING if after.reason == str(after.state):
            yield f"{after.name} is drained: it gets no new requests"
        case ReplicaState.DRAINING:
            yield f"{after.name} is {after.reason}"
        case _:
            yield f"{after.name}: {after.state}: {after.reason}"
