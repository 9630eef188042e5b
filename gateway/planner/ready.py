"""The ready replicas with what stays of them from request to request, worked out when they change and not before."""

from collections.abc import Callable, Mapping, Set
from functools import lru_cache

import msgspec

from engine.fleet import FleetSnapshot, FleetView, Replica, ReplicaState
from gateway.block_registry.tables import Table
from gateway.errors import NoReplicaReady, ReplicaNotReady, UnknownReplica
from gateway.steering.costs.model import ModelKey

MODEL_KEYS_MAX = 1024
_NOBODY: frozenset[str] = frozenset()


class Standing(msgspec.Struct, frozen=True, gc=False, eq=False):
    """One replica. It can import from `sources`; without a table it holds nothing that we know of."""

    name: str
    replica: Replica
    key: ModelKey
    table: Table | None
    transport: str
    block_size: int
    blocks: int
    """That may hold something: one, the null block, never does."""
    sources: frozenset[str]


class Lineup(msgspec.Struct, frozen=True, eq=False):
    """All replicas that are `ready`, in their order; `names` are sorted. It holds as long as the other three are the same."""

    ready: Mapping[str, Replica]
    tables: Mapping[str, Table]
    exchanges: Mapping[str, frozenset[str]]
    replicas: Mapping[str, Standing]
    names: list[str]


EMPTY = Lineup({}, {}, {}, {}, [])


def line_up(
    ready: Mapping[str, Replica], tables: Mapping[str, Table], exchanges: Mapping[str, frozenset[str]], *, imports: bool
) -> Lineup:
    """Return the lineup of these; without `imports` nobody imports from anybody."""
    found = {}
    for name, replica in ready.items():
        table = tables.get(name)
        if table is None:
            found[name] = Standing(name, replica, _key(replica.device, b""), None, "", 1, 0, _NOBODY)
            continue
        key = _key(replica.device, table.fingerprint)
        sources = exchanges[name] if imports else _NOBODY
        found[name] = Standing(name, replica, key, table, table.transport, table.block_size, table.num_blocks - 1, sources)
    return Lineup(ready, tables, exchanges, found, sorted(ready))


@lru_cache(maxsize=MODEL_KEYS_MAX)
def _key(device: str, fingerprint: bytes) -> ModelKey:
    """Whose prefill terms a replica has: its kind of device's, with the fingerprint for the model."""
    return ModelKey(device.partition(":")[0], fingerprint.hex()[:16])


class ReadyReplicas:
    """Belongs to one thread. `changed` is told of each change."""

    def __init__(self, fleet: FleetView, changed: Callable[[FleetSnapshot], None] = lambda snapshot: None) -> None:
        self._fleet = fleet
        self._changed = changed
        self._snapshot: FleetSnapshot | None = None
        self._ready: Mapping[str, Replica] = {}

    def refresh(self) -> FleetSnapshot:
        """Take note of changes; returns the fleet as it is."""
        snapshot = self._fleet.snapshot()
        if snapshot is not self._snapshot:
            self._snapshot = snapshot
            self._ready = {replica.name: replica for replica in snapshot.ready()}
            self._changed(snapshot)
        return snapshot

    def now(self, wanted: str | None = None, exclude: Set[str] = frozenset()) -> Mapping[str, Replica]:
        """Return them by name, in their order; the same object as before if nothing changed.

        Raises UnknownReplica, ReplicaNotReady and NoReplicaReady, also when the one that is `wanted` can not be had.
        """
        snapshot = self.refresh()
        if wanted is not None:
            _check(snapshot, wanted, exclude)
        ready = self._ready
        if exclude:
            ready = {name: replica for name, replica in ready.items() if name not in exclude}
        if not ready:
            raise NoReplicaReady("; ".join(f"{replica.name} is {replica.state.value}" for replica in snapshot.replicas))
        return ready


def _check(snapshot: FleetSnapshot, wanted: str, exclude: Set[str]) -> None:
    replica = snapshot.find(wanted)
    if replica is None:
        raise UnknownReplica(wanted, [known.name for known in snapshot.replicas])
    if replica.state is not ReplicaState.READY:
        raise ReplicaNotReady(wanted, replica.state.value)
    if wanted in exclude:
        raise NoReplicaReady(f"{wanted} was lost")
