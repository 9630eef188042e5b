"""What vLLM loads in place of engine.connector: the same connector, that looks only where the arm lets it.

In a private pool a replica also keeps a block of which another region has a copy: it could not restore that one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.pools.reach import VARIABLE, Reach, read
from engine.connector import PeerKVConnector
from engine.connector.import_sources import Peers
from transport.keys import Keys
from transport.table.deliveries import DeliveryReason
from transport.table.reader import TableReader

__all__ = ["PeerKVConnector"]

_where = Path(os.environ[VARIABLE])
_find, _who_go_on, _stored_elsewhere = Peers._find, Peers._who_go_on, Peers.stored_elsewhere


def within_reach(self: Peers, readers: list[TableReader]) -> list[TableReader]:
    """Return the readers that are not out of reach."""
    reach = read(_where)
    return [reader for reader in readers if reach.allows(reader.name, self._own_tier)]


def find(self: Peers, tables: Mapping[str, TableReader], source: str | None) -> tuple[list[TableReader], DeliveryReason]:
    """Peers._find, without those that are out of reach."""
    readers, why = _find(self, tables, source)
    within = within_reach(self, readers)
    return within, DeliveryReason.NO_SOURCE_GIVEN if readers and not within else why


def who_go_on(self: Peers, tables: Mapping[str, TableReader], keys: Keys, begin: int) -> list[TableReader]:
    """Peers._who_go_on, without those that are out of reach."""
    return within_reach(self, _who_go_on(self, tables, keys, begin))


def stored_elsewhere(self: Peers, keys: Keys) -> npt.NDArray[np.bool_]:
    """Peers.stored_elsewhere, of regions that can be restored from."""
    return _stored_elsewhere(self, keys) if read(_where) is Reach.POOL else np.zeros(len(keys), np.bool_)


Peers._find = find  # type: ignore[method-assign]
Peers._who_go_on = who_go_on  # type: ignore[method-assign]
Peers.stored_elsewhere = stored_elsewhere  # type: ignore[method-assign]
