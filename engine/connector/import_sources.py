"""Which replicas an engine may import from: those whose KV is the same as its own would be, and can be read."""

import logging
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from engine.connector.sequence import Import
from engine.connector.vllm_groups import ModelGroups
from transport.fingerprint import fingerprint_difference
from transport.keys import Keys
from transport.node.names import node_of
from transport.table.deliveries import SOURCES_MAX, DeliveryReason
from transport.table.directory import TableDirectory
from transport.table.group_look_up import GroupChain, supply
from transport.table.reader import TableReader
from transport.table.tiers import tier_kind

_logger = logging.getLogger(__name__)

UNREADABLE_MAX = 3
"""After this many imports without any readable block, an owner is not asked again in its epoch."""
TAIL_SHARE = 16
"""A further source that would bring the last of an import, and less than this part of what is missing, is left out: its queue
may take longer than computing so little does."""


class Peers:
    """The peers in `peers` that have our fingerprint (`digest`, made of `fields`); `refused` is called once for each other."""

    def __init__(
        self,
        peers: TableDirectory,
        digest: bytes,
        fields: Mapping[str, str],
        *,
        groups: ModelGroups,
        hash_name: str,
        transport: str,
        refused: Callable[[], None],
        own_tier: str = "",
    ) -> None:
        self._own_tier = own_tier
        self._peers = peers
        self._fields = fields
        self._groups = groups
        self._alike = (digest, "ok", groups.unit, hash_name, transport)
        self._on_refusal = refused
        self._refused: set[tuple[str, int]] = set()
        self._unreadable: dict[tuple[str, int], int] = {}

    def best(self, source: str | None, keys: Keys, begin: int, end: int) -> tuple[tuple[Import, ...], DeliveryReason]:
        """Return the imports, one behind the other, that bring a sequence from `begin` tokens to `end`, and why not that far.

        `keys` are those of the first `end` tokens; `source` names the replica to ask first; None means the one that has most.
        Where that has no more, whoever has most from there on follows, of this node's: what another node's link takes only the
        gateway weighs. Nobody stands in for a named one that has nothing of it. Models with several groups have one source.
        """
        tables = self._peers.tables()
        readers, why = self._find(tables, source)
        chain = GroupChain(self._groups.groups, keys)
        found = self._longest(readers, chain, keys, begin, end)
        parts = (found,) if found is not None else ()
        reached = found.end if found is not None else begin
        goes_on = self._groups.plain and (bool(parts) or self._have_what_is_here(readers, keys, begin))
        while goes_on and reached < end and len(parts) < SOURCES_MAX:
            found = self._longest(self._who_go_on(tables, keys, reached), chain, keys, reached, end)
            if found is None:
                break
            parts, reached = (*parts, found), found.end
        while len(parts) > 1 and parts[-1].tokens * TAIL_SHARE < end - begin:
            parts, reached = parts[:-1], parts[-1].begin
        if readers and reached < end:
            why = DeliveryReason.SOURCE_HELD_LESS
        return parts, why

    def _longest(self, readers: Iterable[TableReader], chain: GroupChain, keys: Keys, begin: int, end: int) -> Import | None:
        best: Import | None = None
        for reader in readers:
            found = self._supply(reader, chain, keys, begin, end)
            if found is not None and (best is None or found.end > best.end):
                best = found
        return best

    def _have_what_is_here(self, readers: Iterable[TableReader], keys: Keys, begin: int) -> bool:
        """Return whether one of them has the block before `begin` tokens: it had no more than the engine itself has."""
        before = begin // self._groups.unit - 1
        return before >= 0 and any(reader.holds(*keys[before].tolist()) for reader in readers)

    def _who_go_on(self, tables: Mapping[str, TableReader], keys: Keys, begin: int) -> list[TableReader]:
        """Return this node's readers that have the block behind `begin` tokens: a look-up takes fifty times as long."""
        low, high = keys[begin // self._groups.unit].tolist()
        here = [table for name, table in tables.items() if table.holds(low, high) and not node_of(name)]
        return [reader for reader in here if self._exchanges_with(reader) and self._is_readable(reader)]

    def _supply(self, reader: TableReader, chain: GroupChain, keys: Keys, begin: int, end: int) -> Import | None:
        if self._groups.plain:
            size = self._groups.unit
            run = reader.longest_run(keys[begin // size :])
            reached = begin + len(run) * size
            return Import(reader.name, reader.epoch, begin, reached, run.block_ids, run.states) if len(run) else None
        found = supply(reader, chain, begin, end)
        if found is None:
            return None
        return Import(reader.name, reader.epoch, begin, found.tokens, found.block_ids, found.states, found.counts)

    def stored_elsewhere(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Tell which of `keys`, shape (n, 2), another replica's host memory holds."""
        held = np.zeros(len(keys), np.bool_)
        for name, reader in self._peers.tables().items():
            other = name != self._own_tier and not node_of(name)  # what another node keeps is no reason not to
            if tier_kind(name) == "host_memory" and other and self._exchanges_with(reader):
                held |= reader.look_up(keys)[0]
        return held

    def not_read(self, name: str, epoch: int) -> None:
        """Record that an import brought nothing at all."""
        self._unreadable[name, epoch] = self._unreadable.get((name, epoch), 0) + 1

    def close(self) -> None:
        """Close the peers' tables."""
        self._peers.close()

    def _find(self, tables: Mapping[str, TableReader], source: str | None) -> tuple[list[TableReader], DeliveryReason]:
        """Return the readers that may be asked, all if no `source` is named, and why there is none if there is none."""
        if source is not None and source not in tables:
            return [], DeliveryReason.SOURCE_GONE
        readers = list(tables.values()) if source is None else [tables[source]]
        if not readers:
            return [], DeliveryReason.NO_SOURCE_GIVEN
        alike = [reader for reader in readers if self._exchanges_with(reader)]
        if not alike:
            return [], DeliveryReason.NOT_EXCHANGING
        readable = [reader for reader in alike if self._is_readable(reader)]
        return readable, DeliveryReason.NONE if readable else DeliveryReason.SOURCE_UNREADABLE

    def _is_readable(self, reader: TableReader) -> bool:
        return self._unreadable.get((reader.name, reader.epoch), 0) < UNREADABLE_MAX

    def _exchanges_with(self, reader: TableReader) -> bool:
        if (reader.fingerprint, reader.status, reader.block_size, reader.hash_name, reader.transport) == self._alike:
            return True
        if (reader.name, reader.epoch) not in self._refused:
            self._refused.add((reader.name, reader.epoch))
            self._on_refusal()
            why = fingerprint_difference(dict(self._fields), reader.fingerprint_fields) or (f"status: {reader.status}",)
            _logger.warning("no exchange with %s: %s", reader.name, "; ".join(why))
        return False
