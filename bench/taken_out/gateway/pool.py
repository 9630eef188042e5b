"""Without the shared pool: a replica restores from its own region of host memory alone."""

from collections.abc import Mapping, Set

from gateway.block_registry import fleet_state
from gateway.block_registry.fleet_state import Epoch
from gateway.block_registry.tables import Table
from transport.table.tiers import host_memory_of

_reachable = fleet_state._sources


def _sources(ours: str, table: Table, others: Mapping[str, Table], refused: Set[tuple[Epoch, Epoch]]) -> frozenset[str]:
    return _reachable(ours, table, others, refused) & {host_memory_of(ours)}


fleet_state._sources = _sources
