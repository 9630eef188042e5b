"""Whom an engine may import from: which replicas' KV is the same as its own would be, and can be read."""

import logging
from collections.abc import Callable, Mapping

from engine.connector.sequence import Import
from transport.fingerprint import fingerprint_difference
from transport.keys import Keys
from transport.table.deliveries import DeliveryReason
from transport.table.directory import TableDirectory
from transport.table.reader import TableReader

_logger = logging.getLogger(__name__)

UNREADABLE_MAX = 3
"""After so many imports of which nothing could be read, an owner is not asked again in its epoch."""


class Peers:
    """The peers in `peers` that have our fingerprint (`digest`, made of `fields`); `refused` is called once for each other."""

    def __init__(
        self,
        peers: TableDirectory,
        digest: bytes,
        fields: Mapping[str, str],
        *,
        block_size: int,
        hash_name: str,
        transport: str,
        refused: Callable[[], None],
    ) -> None:
        self._peers = peers
        self._fields = fields
        self._alike = (digest, "ok", block_size, hash_name, transport)
        self._on_refusal = refused
        self._refused: set[tuple[str, int]] = set()
        self._unreadable: dict[tuple[str, int], int] = {}

    def longest(self, source: str | None, keys: Keys, local_blocks: int) -> tuple[Import | None, DeliveryReason]:
        """Return an import of the longest run of `keys` that one may be asked for, and why it is not all of them.

        `keys` are those behind `local_blocks` blocks; `source` names the one to ask, None for whoever has most.
        """
        best: Import | None = None
        readers, why = self._find(source)
        for reader in readers:
            run = reader.longest_run(keys)
            if len(run) > (len(best) if best else 0):
                best = Import(reader.name, reader.epoch, local_blocks, run.block_ids, run.states)
        if readers and (best is None or len(best) < len(keys)):
            why = DeliveryReason.SOURCE_HELD_LESS
        return best, why

    def not_read(self, name: str, epoch: int) -> None:
        """Note that an import brought nothing at all."""
        self._unreadable[name, epoch] = self._unreadable.get((name, epoch), 0) + 1

    def close(self) -> None:
        """Close the peers' tables."""
        self._peers.close()

    def _find(self, source: str | None) -> tuple[list[TableReader], DeliveryReason]:
        """Return the readers that may be asked, all if no `source` is named, and why there is none if there is none."""
        tables = self._peers.tables()
        if source is not None and source not in tables:
            return [], DeliveryReason.SOURCE_GONE
        readers = list(tables.values()) if source is None else [tables[source]]
        if not readers:
            return [], DeliveryReason.NO_SOURCE_GIVEN
        alike = [reader for reader in readers if self._exchanges_with(reader)]
        if not alike:
            return [], DeliveryReason.NOT_EXCHANGING
        readable = [reader for reader in alike if self._unreadable.get((reader.name, reader.epoch), 0) < UNREADABLE_MAX]
        return readable, DeliveryReason.NONE if readable else DeliveryReason.SOURCE_UNREADABLE

    def _exchanges_with(self, reader: TableReader) -> bool:
        if (reader.fingerprint, reader.status, reader.block_size, reader.hash_name, reader.transport) == self._alike:
            return True
        if (reader.name, reader.epoch) not in self._refused:
            self._refused.add((reader.name, reader.epoch))
            self._on_refusal()
            why = fingerprint_difference(dict(self._fields), reader.fingerprint_fields) or (f"status: {reader.status}",)
            _logger.warning("no exchange with %s: %s", reader.name, "; ".join(why))
        return False
