"""Without anything from other replicas: neither the shared pool nor their KV caches, but a replica's own host memory."""

from collections.abc import Mapping, Set

import bench.taken_out.gateway.pool  # noqa: F401 - other regions of host memory
from gateway.block_registry import fleet_state
from gateway.block_registry.fleet_state import NOBODY, Epoch
from gateway.block_registry.tables import Table


def _exchanging(tables: Mapping[str, Table], refused: Set[tuple[Epoch, Epoch]]) -> dict[str, frozenset[str]]:
    return dict.fromkeys(tables, NOBODY)


fleet_state._exchanging = _exchanging
