"""The mirrors of one other node: what it tells, written into this node's directory of tables. No sockets here.

Its clock is not ours: times are told in its CLOCK_MONOTONIC, and taken over as ours by the least difference seen between the
time of a beat and the time it came.
"""

import logging
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from transport.errors import TableError
from transport.keys import Keys
from transport.node.messages import (
    Beat,
    Delivered,
    EngineTold,
    LayerTold,
    Message,
    NodeError,
    TableChanged,
    TableClosed,
    TableOpened,
)
from transport.node.mirror_table import MirrorTable
from transport.node.names import HOLDER_NAME, as_told_by, on_node
from transport.table.deliveries import Delivery
from transport.table.layout import BLOCKS_MAX, Description, Layer, Memory, Region

_logger = logging.getLogger(__name__)

TABLES_MAX = 256
"""Tables of one node."""
TIMES = ("arrived_ns", "asked_ns", "scheduled_ns", "first_token_ns")
MIRRORED = "shared_memory"
STAGED_BYTES = 64
"""What slots of the staging memory are multiples of."""


class Mirrors:
    """What `node` tells, in `table_dir`; `here` is our name, `staging` the memory that our agent puts fetched blocks into.

    Belongs to one thread.
    """

    def __init__(self, table_dir: Path, node: str, here: str, pid: int, staging: Region, clock_ns: Callable[[], int]) -> None:
        self._table_dir = table_dir
        self._node = node
        self._here = here
        self._pid = pid
        self._staging = staging
        self._clock_ns = clock_ns
        self._tables: dict[str, MirrorTable] = {}
        self._sequence: dict[str, int] = {}
        self._offset_ns: int | None = None

    def __len__(self) -> int:
        return len(self._tables)

    def hear(self, message: Message) -> None:
        """Take in what the node tells. Raises NodeError if that cannot be, or finds no room: then nothing of it is believed."""
        try:
            self._hear(message)
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise NodeError(f"{self._node} tells what cannot be: {error}") from error
        except (TableError, OSError) as error:
            raise NodeError(f"a mirror of {self._node}: {error}") from error

    def _hear(self, message: Message) -> None:
        match message:
            case Beat():
                late = self._clock_ns() - message.now_ns
                self._offset_ns = late if self._offset_ns is None else min(late, self._offset_ns)
            case TableOpened():
                self._open(message)
            case TableChanged():
                self._change(message)
            case EngineTold():
                if (table := self._tables.get(message.name)) is not None:
                    table.tell_engine(self._here_ns(message.heartbeat_ns), message.load, message.counters, message.waiting)
            case Delivered():
                if (table := self._tables.get(message.name)) is not None:
                    for delivery in message.deliveries:
                        table.told(self._translated(delivery))
            case TableClosed():
                self._close(message.name)
            case _:
                raise NodeError(f"{self._node} sent what does not belong here")

    def close(self) -> None:
        """End all mirrors: the node is not heard any more."""
        for name in list(self._tables):
            self._close(name)

    def _open(self, told: TableOpened) -> None:
        self._close(told.name)
        if len(self._tables) >= TABLES_MAX or not 0 < told.blocks <= BLOCKS_MAX or told.block_size < 1:
            raise NodeError(f"{self._node} tells of more tables, or of larger ones, than can be")
        if not HOLDER_NAME.fullmatch(told.name):
            raise NodeError(f"{self._node} tells of a table called {told.name!r}")
        memories = tuple(_staged(memory.rank, memory.layers, self._staging) for memory in told.memories)
        description = Description(
            on_node(self._node, told.name), self._pid, told.hash_name, told.transport, told.status, told.fingerprint,
            memories, told.groups,
        )  # fmt: skip
        self._tables[told.name] = MirrorTable(self._table_dir, description, told.block_size, told.blocks, told.epoch)
        self._sequence[told.name] = 0

    def _change(self, told: TableChanged) -> None:
        table = self._tables.get(told.name)
        if table is None:
            return
        self._sequence[told.name] += 1
        if told.sequence != self._sequence[told.name]:
            raise NodeError(f"{self._node} left out changes of {told.name}")
        ids = np.frombuffer(told.ids, "<u4").astype(np.int64)
        states = np.frombuffer(told.states, "<u8")
        keys: Keys = np.frombuffer(told.keys, "<u8").reshape(-1, 2)
        if not len(ids) == len(states) == len(keys) or len(np.unique(ids)) != len(ids):
            raise ValueError("counts that do not fit together")
        table.change(ids, states, keys)

    def _close(self, name: str) -> None:
        table = self._tables.pop(name, None)
        if table is not None:
            table.close()

    def _here_ns(self, there_ns: int) -> int:
        return max(1, there_ns + (self._offset_ns or 0)) if there_ns else 0

    def _translated(self, delivery: Delivery) -> Delivery:
        changed: dict[str, object] = {name: self._here_ns(getattr(delivery, name)) for name in TIMES}
        if delivery.source:
            changed["source"] = as_told_by(self._node, delivery.source, self._here)
        if delivery.further:
            named = (msgspec.structs.replace(e, source=as_told_by(self._node, e.source, self._here)) for e in delivery.further)
            changed["further"] = tuple(named)
        return msgspec.structs.replace(delivery, **changed)


def _staged(rank: int, layers: tuple[LayerTold, ...], staging: Region) -> Memory:
    """Return how fetched blocks lie: in slots of the staging memory, of each the layers side by side."""
    sizes: dict[int, int] = {}
    placed: list[tuple[int, int, int]] = []
    for layer in layers:
        if not 0 < layer.bytes < 1 << 32 or not 0 <= layer.group < 64:
            raise NodeError("a layer of no possible size")
        placed.append((sizes.get(layer.group, 0), layer.bytes, layer.group))
        sizes[layer.group] = sizes.get(layer.group, 0) + layer.bytes
    stride = slot_bytes(max(sizes.values(), default=0))
    return Memory(rank, MIRRORED, (staging,), tuple(Layer(0, offset, stride, size, group) for offset, size, group in placed))


def slot_bytes(content: int) -> int:
    """Return the bytes of a slot for a block of `content` bytes."""
    return -(-content // STAGED_BYTES) * STAGED_BYTES
