"""The fleet at one moment: the replicas, their live block tables, and who can import from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import msgspec

from engine.fleet import FleetSnapshot, Replica, ReplicaState
from gateway.block_registry.tables import Table
from transport.fingerprint import fingerprint_difference
from transport.groups import Group, plain
from transport.keys import HASHES
from transport.table.tiers import is_tier

STATUS_OK = "ok"
NOBODY: frozenset[str] = frozenset()

Epoch = tuple[str, int]
"""One start of a replica: its name and its table's epoch."""


class ReadyReplica(msgspec.Struct, frozen=True, gc=False, eq=False):
    """A replica that takes requests. It can import from `sources`; without a table it holds nothing that we know of.

    `blocks` may hold something: all but the null block, which never does.
    """

    name: str
    replica: Replica
    table: Table | None = None
    transport: str = ""
    block_size: int = 1
    blocks: int = 0
    sources: frozenset[str] = NOBODY


class TableKind(msgspec.Struct, frozen=True, eq=False):
    """Tables in which the same chain of keys is looked up. `plain`: every layer needs all blocks of a prefix.

    `tiers` are, for each replica that can import from any, those that it can import from.
    """

    fingerprint: bytes
    block_size: int
    hash_name: str
    groups: tuple[Group, ...]
    plain: bool
    tables: dict[str, Table]
    tiers: dict[str, dict[str, Table]]


class FleetState(msgspec.Struct, frozen=True, eq=False):
    """Immutable: whatever changes makes another state, and only `FleetWatch` makes them.

    `draining` replicas take no requests any more, but have live tables, so that others can import from them.

    `tables` are the replicas', `tiers` those of what is kept of them elsewhere. `sources` names, for each table, the others
    whose blocks its replica can import; `places` the place of its kind in `kinds`. `ready` replicas are in the fleet's order,
    their `names` sorted.
    """

    snapshot: FleetSnapshot
    tables: Mapping[str, Table]
    sources: Mapping[str, frozenset[str]]
    kinds: tuple[TableKind, ...]
    places: Mapping[str, int]
    ready: Mapping[str, ReadyReplica]
    names: Sequence[str]
    tiers: Mapping[str, Table] = {}
    draining: Mapping[str, ReadyReplica] = {}

    def without(self, names: Set[str]) -> FleetState:
        """The same fleet if these were not ready."""
        ready = {name: replica for name, replica in self.ready.items() if name not in names}
        return msgspec.structs.replace(self, ready=ready, names=sorted(ready))


EMPTY = FleetState(FleetSnapshot(0, "", "", "", ()), {}, {}, (), {}, {}, ())


def make_state(
    snapshot: FleetSnapshot, tables: Mapping[str, Table], refused: Set[tuple[Epoch, Epoch]], *, imports: bool
) -> FleetState:
    """Return the state of these; `refused` are importers with sources that they do not read, without `imports` nobody does."""
    tiers = {name: table for name, table in tables.items() if is_tier(name)}
    tables = {name: table for name, table in tables.items() if name not in tiers}
    sources = _exchanging(tables, refused) if imports else dict.fromkeys(tables, NOBODY)
    kinds = _kinds(tables, tiers if imports else {}, refused)
    places = {name: place for place, kind in enumerate(kinds) for name in kind.tables}
    ready = {replica.name: _ready(replica, tables.get(replica.name), sources) for replica in snapshot.ready()}
    draining = {
        replica.name: _ready(replica, tables[replica.name], sources)
        for replica in snapshot.replicas
        if replica.state is ReplicaState.DRAINING and replica.name in tables
    }
    return FleetState(snapshot, tables, sources, kinds, places, ready, sorted(ready), tiers, draining)


def _ready(replica: Replica, table: Table | None, sources: Mapping[str, frozenset[str]]) -> ReadyReplica:
    if table is None:
        return ReadyReplica(replica.name, replica)
    return ReadyReplica(
        name=replica.name,
        replica=replica,
        table=table,
        transport=table.transport,
        block_size=table.block_size,
        blocks=table.num_blocks - 1,
        sources=sources[replica.name],
    )


def _exchanging(tables: Mapping[str, Table], refused: Set[tuple[Epoch, Epoch]]) -> dict[str, frozenset[str]]:
    """Return for each table the others that it has no obstacle with: those that say the same, compared once for all of them."""
    alike: dict[tuple[bytes, int, str, str], set[str]] = {}
    for name, table in tables.items():
        if table.status == STATUS_OK:
            alike.setdefault(_identity(table), set()).add(name)
    found = {}
    for name, table in tables.items():
        others = alike.get(_identity(table), NOBODY) if table.status == STATUS_OK else NOBODY
        found[name] = frozenset(others - {name})
    for (ours, epoch), (theirs, their_epoch) in refused:
        if theirs in found.get(ours, NOBODY) and tables[ours].epoch == epoch and tables[theirs].epoch == their_epoch:
            found[ours] -= {theirs}
    return found


def _identity(table: Table) -> tuple[bytes, int, str, str]:
    return table.fingerprint, table.block_size, table.hash_name, table.transport


def _sources(ours: str, table: Table, others: Mapping[str, Table], refused: Set[tuple[Epoch, Epoch]]) -> frozenset[str]:
    return frozenset(
        name
        for name, other in others.items()
        if name != ours and not obstacles(table, other) and ((ours, table.epoch), (name, other.epoch)) not in refused
    )


def _kinds(tables: Mapping[str, Table], tiers: Mapping[str, Table], refused: Set[tuple[Epoch, Epoch]]) -> tuple[TableKind, ...]:
    found: dict[tuple[bytes, int, str], TableKind] = {}
    for name, table in tables.items():
        if table.hash_name not in HASHES:  # from a later version, or damaged: we have no names for its blocks
            continue
        key = (table.fingerprint, table.block_size, table.hash_name)
        kind = found.setdefault(key, TableKind(*key, table.groups, plain(table.groups), {}, {}))
        kind.tables[name] = table
        if sources := _sources(name, table, tiers, refused):
            kind.tiers[name] = {source: tiers[source] for source in sorted(sources) if tiers[source].groups == kind.groups}
    return tuple(found.values())


def obstacles(ours: Table, theirs: Table) -> tuple[str, ...]:
    """Say why one replica cannot import from another; empty if it can."""
    found = [f"it does not exchange: {table.status}" for table in (ours, theirs) if table.status != STATUS_OK]
    for what, here, there in (
        ("block size", ours.block_size, theirs.block_size),
        ("hash", ours.hash_name, theirs.hash_name),
        ("transport", ours.transport, theirs.transport),
    ):
        if here != there:
            found.append(f"{what}: {here} here, {there} there")
    if ours.fingerprint != theirs.fingerprint:
        found.extend(fingerprint_difference(ours.fingerprint_fields, theirs.fingerprint_fields))
    return tuple(dict.fromkeys(found))
