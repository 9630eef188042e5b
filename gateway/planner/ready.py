"""Which replicas a request may go to, or the error that says why there is none."""

from collections.abc import Set

from engine.fleet import ReplicaState
from gateway.block_registry.fleet_state import FleetState
from gateway.errors import NoReplicaReady, ReplicaNotReady, UnknownReplica


def with_ready(state: FleetState, wanted: str | None = None, exclude: Set[str] = frozenset()) -> FleetState:
    """Return the state without the replicas in `exclude`; at least one is ready.

    Raises UnknownReplica, ReplicaNotReady and NoReplicaReady, also when the one that is `wanted` cannot be had.
    """
    if wanted is not None:
        _check(state, wanted, exclude)
    if exclude:
        state = state.without(exclude)
    if not state.ready:
        states = "; ".join(f"{replica.name} {replica.state.in_words}" for replica in state.snapshot.replicas)
        raise NoReplicaReady(states or "there are none: `peerkv engine` starts them")
    return state


def _check(state: FleetState, wanted: str, exclude: Set[str]) -> None:
    replica = state.snapshot.find(wanted)
    if replica is None:
        raise UnknownReplica(wanted, [known.name for known in state.snapshot.replicas])
    if replica.state is not ReplicaState.READY:
        raise ReplicaNotReady(wanted, replica.state.in_words)
    if wanted in exclude:
        raise NoReplicaReady(f"{wanted} was lost")
