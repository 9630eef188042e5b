"""What a node tells others of its block tables: each table once, then what changed, round by round. Pure but for the tables.

The journal of a table names what changed, so a round costs as much as there is to tell. Names are this node's own; the tables
of other nodes, which are mirrors here, are not told on.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from transport.node.messages import (
    Delivered,
    EngineTold,
    LayerTold,
    MemoryTold,
    Message,
    TableChanged,
    TableClosed,
    TableOpened,
)
from transport.node.names import node_of
from transport.node.readable import readable, stored_on_demand
from transport.table.layout import LOAD, Memory
from transport.table.quality import in_code
from transport.table.reader import TableReader
from transport.table.tiers import tier_kind

PIECE_BLOCKS = 1 << 16
"""Blocks told in a frame: 2 MB."""
TOLD = (None, "host_memory")
"""Engines, and what is kept of them in host memory; what a node brings up from its disk or vault is for its own engines."""
NOT_READABLE = "its KV cache lies on a GPU: other nodes read its host memory (--host-memory)"


@dataclass(slots=True)
class _Told:
    """What was told of a table so far."""

    reader: TableReader
    fetched: bool
    """Whether its blocks can be fetched."""
    head: int
    sequence: int = 0
    begun: bool = False
    decoded: bool = False
    """Whether blocks that lie coded were told as well."""
    delivery: int = 0
    engine: EngineTold | None = None


class Changes:
    """One subscriber's view. `round` tells all that is new since the round before; of blocks that lie coded only while this
    node `decodes` them: nodes fetch blocks as engines have them."""

    def __init__(self, *, decodes: Callable[[], bool] = bool) -> None:
        self._decodes = decodes
        self._told: dict[str, _Told] = {}

    def round(self, tables: Mapping[str, TableReader]) -> Iterator[Message]:
        """Yield what is new of the live tables."""
        own = {name: reader for name, reader in tables.items() if not node_of(name) and tier_kind(name) in TOLD}
        for name in [name for name, told in self._told.items() if own.get(name) is not told.reader]:
            yield from self._deliveries(name, self._told.pop(name))
            yield TableClosed(name)
        for name, reader in own.items():
            told, fetched = self._told.get(name), readable(reader) or stored_on_demand(reader, own)
            if told is None or told.fetched != fetched:  # host memory may come after its engine
                delivery = told.delivery if told is not None else 0
                told = self._told[name] = _Told(reader, fetched, reader.journal.head[0], delivery=delivery)
                yield _opened(name, reader, fetched)
            yield from self._changed(name, told)
            yield from self._engine(name, told)
            yield from self._deliveries(name, told)

    def delivered(self, tables: Mapping[str, TableReader]) -> bool:
        """Tell whether an engine delivered something since the last round."""
        return any(
            tables.get(name) is told.reader and told.reader.newest() != told.delivery for name, told in self._told.items()
        )

    def _changed(self, name: str, told: _Told) -> Iterator[TableChanged]:
        reader = told.reader
        head, decodes = reader.journal.head[0], self._decodes()
        same = told.begun and decodes == told.decoded
        blocks = reader.journal.since(told.head) if same else None
        if same and head == told.head:
            return
        told.head, told.decoded = head, decodes
        if blocks is None:  # the first time, or more than the journal holds, or coded ones are told now or no more
            blocks = np.arange(reader.num_blocks)
        for begin in range(0, len(blocks), PIECE_BLOCKS):
            piece = blocks[begin : begin + PIECE_BLOCKS]
            states, keys = reader.content(piece)
            if not decodes:
                states = np.where(in_code(states), states | np.uint64(1), states)
            if not told.begun:
                held = states & np.uint64(1) == 0
                piece, states, keys = piece[held], states[held], keys[held]
            if len(piece):
                told.sequence += 1
                yield TableChanged(
                    name,
                    told.sequence,
                    piece.astype("<u4").tobytes(),
                    states.astype("<u8", copy=False).tobytes(),
                    np.ascontiguousarray(keys).astype("<u8", copy=False).tobytes(),
                )
        told.begun = True

    def _engine(self, name: str, told: _Told) -> Iterator[EngineTold]:
        reader = told.reader
        load = reader.load()
        now = EngineTold(
            name,
            reader.heartbeat_ns(),
            {field: getattr(load, field) for field in LOAD},
            reader.counters(),
            reader.waiting(),
        )
        if now != told.engine:
            told.engine = now
            yield now

    def _deliveries(self, name: str, told: _Told) -> Iterator[Delivered]:
        newest, found = told.reader.deliveries(told.delivery)
        if newest != told.delivery:
            told.delivery = newest
            if found:
                yield Delivered(name, tuple(found))


def _opened(name: str, reader: TableReader, fetched: bool) -> TableOpened:
    status, memories = reader.status, tuple(_memory(memory) for memory in reader.memories)
    if status == "ok" and not fetched:
        status, memories = NOT_READABLE, ()
    return TableOpened(
        name,
        reader.epoch,
        reader.block_size,
        reader.num_blocks,
        reader.hash_name,
        reader.transport,
        status,
        dict(reader.fingerprint_fields),
        reader.groups,
        memories,
    )


def _memory(memory: Memory) -> MemoryTold:
    return MemoryTold(memory.rank, tuple(LayerTold(layer.bytes, layer.group) for layer in memory.layers))
