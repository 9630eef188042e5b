"""The replicas that take new requests, worked out anew only when the fleet's state is another one."""

from collections.abc import Mapping, Set

from engine.fleet import FleetSnapshot, FleetView, Replica, ReplicaState
from gateway.errors import NoReplicaReady, ReplicaNotReady, UnknownReplica


class ReadyReplicas:
    """Belongs to one thread."""

    def __init__(self, fleet: FleetView) -> None:
        self._fleet = fleet
        self._snapshot: FleetSnapshot | None = None
        self._ready: Mapping[str, Replica] = {}

    def now(self, pinned: str | None = None, exclude: Set[str] = frozenset()) -> Mapping[str, Replica]:
        """Return them by name, in their order; the same object as before if nothing changed.

        Raises UnknownReplica, ReplicaNotReady and NoReplicaReady, also when the one that is `pinned` can not be had.
        """
        snapshot = self._fleet.snapshot()
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._ready = {replica.name: replica for replica in snapshot.ready()}
        if pinned is not None:
            _check(snapshot, pinned, exclude)
        ready = self._ready
        if exclude:
            ready = {name: replica for name, replica in ready.items() if name not in exclude}
        if not ready:
            raise NoReplicaReady("; ".join(f"{replica.name} is {replica.state.value}" for replica in snapshot.replicas))
        return ready


def _check(snapshot: FleetSnapshot, pinned: str, exclude: Set[str]) -> None:
    replica = snapshot.find(pinned)
    if replica is None:
        raise UnknownReplica(pinned, [known.name for known in snapshot.replicas])
    if replica.state is not ReplicaState.READY:
        raise ReplicaNotReady(pinned, replica.state.value)
    if pinned in exclude:
        raise NoReplicaReady(f"{pinned} was lost")
