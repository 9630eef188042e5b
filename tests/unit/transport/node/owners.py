"""Owners of blocks on a node that serves them to others, and memory to fetch them into."""

from pathlib import Path

import numpy as np
import torch

from tests.unit.transport.table_fixtures import writer
from transport.backends.shared_memory import SharedMemoryTransport
from transport.keys import chain_keys, root_key
from transport.node.block_server import BlockServer
from transport.node.messages import BlocksAsked
from transport.node.nixl.ability import NO_NIXL
from transport.node.staging import Piece
from transport.table.directory import TableDirectory

BLOCKS, LAYERS = 64, 3
KEYS = chain_keys(root_key(b"f" * 16), range(BLOCKS), 1)


class Owner:
    """A replica with memory and a table whose block b is offered under KEYS[b], on a node that serves it."""

    def __init__(self, path: Path, context=None, offers=NO_NIXL) -> None:
        self.caches = {f"layer.{i}": torch.randint(0, 99, (BLOCKS, 2, 4, 8 + i), dtype=torch.uint8) for i in range(LAYERS)}
        transport = SharedMemoryTransport(self.caches, BLOCKS)
        self.table = writer(path, "owner", BLOCKS, memories=(transport.memory(),))
        self.table.publish(range(BLOCKS), KEYS)
        self.reader = TableDirectory(path).tables()["owner"]
        self.server = BlockServer(path, "node-a", ("127.0.0.1", 0), context, "test", offers)
        self.server.start()

    def asked(self, blocks, **other) -> BlocksAsked:
        return question(self.reader, blocks, **other)

    def block(self, number: int) -> bytes:
        return b"".join(cache[number].numpy().tobytes() for cache in self.caches.values())

    @property
    def bytes(self) -> int:
        return len(self.block(0))

    def close(self) -> None:
        self.server.close()
        self.table.close()


def question(reader, blocks, **other) -> BlocksAsked:
    """Ask for blocks as a table says that they are now."""
    ids = np.array(blocks)
    fields = {"name": reader.name, "epoch": reader.epoch, "rank": 0, "ids": ids.astype("<u4").tobytes(),
              "states": reader.content(ids)[0].tobytes()}  # fmt: skip
    return BlocksAsked(**(fields | other))


def loose(rows: np.ndarray) -> Piece:
    """Memory of our own to fetch into, uint8 (n, bytes)."""
    return Piece(0, rows.shape[1], rows)
