"""What the front door sees of the replicas: immutable snapshots, and two ways to get them."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import msgspec

FLEET_FILE = "fleet.json"


class FleetError(Exception):
    """Base of errors that concern the replicas as a whole; the message says what to do."""


class ReplicaState(StrEnum):
    """The state of a replica; only READY takes new requests."""

    STARTING = "starting"  # its process loads the model
    READY = "ready"  # answered /health
    DRAINING = "draining"  # finishes its requests, takes no new ones
    BACKOFF = "backoff"  # ended unexpectedly; waits to be restarted
    FAILED = "failed"  # failed too often; waits for somebody to restart it
    STOPPED = "stopped"  # ended because it was asked to

    @property
    def in_words(self) -> str:
        """What is said of a replica in this state, behind its name."""
        match self:
            case ReplicaState.BACKOFF:
                return "has ended and is started again soon"
            case ReplicaState.FAILED:
                return "has failed and stays down until somebody restarts it"
            case _:
                return f"is {self.value}"


@dataclass(frozen=True, slots=True)
class Replica:
    """One vLLM server: `socket` and `log` are paths, `device` is "cpu" or "cuda:<ids>"."""

    name: str
    state: ReplicaState
    socket: str
    pid: int | None
    restarts: int
    reason: str
    device: str
    log: str


@dataclass(frozen=True, slots=True)
class FleetSnapshot:
    """All replicas at one moment; `version` grows with every change.

    `pid_namespace` is the inode of the one that their processes' ids belong to, 0 where that is not known.
    """

    version: int
    model: str
    served_model_name: str
    table_dir: str
    replicas: tuple[Replica, ...]
    pid_namespace: int = 0
    vllm_args: tuple[str, ...] = ()  # the user's own: some change how prompts are rendered
    node: str = ""  # what other nodes call this one; "" if there are none
    network_bytes_per_second: float = 0.0  # of the fastest other node that serves the same, as measured; 0 if none was

    def ready(self) -> tuple[Replica, ...]:
        """The replicas that take new requests, in their order."""
        return tuple(r for r in self.replicas if r.state is ReplicaState.READY)

    def find(self, name: str) -> Replica | None:
        """The replica of that name, or None."""
        return next((r for r in self.replicas if r.name == name), None)


def reasons_in_words(replicas: Iterable[Replica]) -> str:
    """Why these replicas are what they are, each reason once."""
    names: dict[str, list[str]] = {}
    for replica in replicas:
        names.setdefault(replica.reason, []).append(replica.name)
    return "; ".join(f"{', '.join(who)}: {reason}" for reason, who in names.items())


class FleetView(Protocol):
    """How the front door queries the replicas. Both calls are cheap enough for every request."""

    def snapshot(self) -> FleetSnapshot:
        """The newest known state."""
        ...

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        """A connection to `name` failed, or requests are far `overdue` there: look at it now. Unknown names are ignored."""
        ...


class FleetControl(FleetView, Protocol):
    """How an admin changes what the replicas do. Methods raise FleetError for unknown names."""

    @property
    def restarts(self) -> bool:
        """Whether `restart` is for this process to do."""
        ...

    async def drain(self, name: str) -> None:
        """Send `name` no new requests until `resume`, or until it is restarted."""
        ...

    async def resume(self, name: str) -> None:
        """Send `name` requests again after `drain`."""
        ...

    async def restart(self, name: str) -> None:
        """Stop `name` and start it again; does not wait. Raises FleetError, also where that is somebody else's to do."""
        ...

    async def idle_in(self, name: str, seconds: float) -> bool:
        """Wait until a draining `name` has no requests that are known here, `seconds` at most; tell whether that is so."""
        ...


def own_pid_namespace() -> int:
    """The inode of the PID namespace of this process; 0 where /proc does not tell."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def encode_fleet(snapshot: FleetSnapshot) -> bytes:
    """`snapshot` as the JSON of fleet.json."""
    return msgspec.json.format(msgspec.json.encode(snapshot), indent=1)


def decode_fleet(raw: bytes) -> FleetSnapshot:
    """The inverse of `encode_fleet`. Raises FleetError when `raw` is anything else."""
    try:
        return msgspec.json.decode(raw, type=FleetSnapshot)
    except msgspec.MsgspecError as error:
        raise FleetError(f"{FLEET_FILE} is not a fleet of this version of peerkv: {error}") from error


def write_fleet(run_dir: Path, snapshot: FleetSnapshot) -> None:
    """Replace run_dir's fleet.json atomically: a reader sees the old one or the new one."""
    fresh = run_dir / f"{FLEET_FILE}.new"
    fresh.write_bytes(encode_fleet(snapshot))
    fresh.replace(run_dir / FLEET_FILE)


class FileFleet:
    """The fleet of another process's supervisor, read from its run_dir: at most once in `hold_seconds`, as asking costs more
    than all else about it, and a replica may die at any moment after it was looked at anyway.

    When the file is gone, so are the replicas: the snapshot is then empty, and comes back with the file.
    """

    def __init__(self, run_dir: Path, hold_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = run_dir / FLEET_FILE
        self._hold_seconds = hold_seconds
        self._clock = clock
        self._held_until = 0.0
        self._stamp: tuple[int, int, int] | None = None
        self._found = self._snapshot = FleetSnapshot(0, "", "", "", ())
        self._drained: dict[str, int | None] = {}  # with the process that is meant
        self._changes = 0

    restarts = False

    def snapshot(self) -> FleetSnapshot:
        """The content of fleet.json, read again when the file was replaced. Raises FleetError."""
        now = self._clock()
        if now < self._held_until:
            return self._snapshot
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp != self._stamp:
                self._found = decode_fleet(self._path.read_bytes())
                self._stamp = stamp
                self._look()
        except FileNotFoundError:
            self._stamp = None
            self._found = self._snapshot = replace(self._found, replicas=())
        self._held_until = now + self._hold_seconds
        return self._snapshot

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        """What is held is out of date. The supervisor that writes the file checks its replicas itself."""
        self._held_until = 0.0

    async def drain(self, name: str) -> None:
        """As FleetControl's, for this gateway alone: others are told by the replicas' own process when that ends."""
        self._drained[name] = self._known(name).pid
        self._change()

    async def resume(self, name: str) -> None:
        """As FleetControl's."""
        self._known(name)
        self._drained.pop(name, None)
        self._change()

    async def restart(self, name: str) -> None:
        """Raises FleetError: who runs the replicas restarts them."""
        self._known(name)
        raise FleetError(f"{name} is run by `peerkv engine` elsewhere: have it restarted there, by whoever operates it")

    async def idle_in(self, name: str, seconds: float) -> bool:
        """Nothing is known here of what others have sent there."""
        self._known(name)
        return True

    def _known(self, name: str) -> Replica:
        found = self.snapshot().find(name)
        if found is None:
            raise FleetError(f"there is no replica {name!r}: there are {', '.join(r.name for r in self._found.replicas)}")
        return found

    def _change(self) -> None:
        self._changes += 1
        self._look()

    def _look(self) -> None:
        """Show drained replicas as such, as long as the same process serves."""
        found, drained = self._found, self._drained
        for replica in found.replicas:
            if replica.name in drained and drained[replica.name] != replica.pid:
                del drained[replica.name]
        replicas = tuple(
            replace(replica, state=ReplicaState.DRAINING, reason="draining")
            if replica.name in drained and replica.state is ReplicaState.READY
            else replica
            for replica in found.replicas
        )
        self._snapshot = replace(found, version=found.version + self._changes, replicas=replicas)
