"""An engine whose KV memory no other process reads, as a GPU's, beside its host memory; the device is a tensor of our own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.unit.transport.node.owners import KEYS
from tests.unit.transport.table_fixtures import writer
from transport.backends.shared_memory import SharedMemoryTransport
from transport.table.layout import Memory

BLOCKS, SLOTS = 64, 32


def caches(blocks: int) -> dict[str, torch.Tensor]:
    return {f"layer.{i}": torch.randint(0, 99, (blocks, 2, 4, 8 + i), dtype=torch.uint8) for i in range(3)}


class Device:
    """The engine `name`: block b of the device is offered under KEYS[b]; `store` puts blocks into slots of host memory."""

    def __init__(self, path: Path, name: str = "owner") -> None:
        self.device, self.memory = caches(BLOCKS), caches(SLOTS)
        layers = SharedMemoryTransport(self.device, BLOCKS).memory().layers
        self.kept = SharedMemoryTransport(self.memory, SLOTS).memory()
        self.table = writer(path, name, BLOCKS, transport="cuda_ipc", memories=(Memory(0, "cuda_ipc", (), layers),))
        self.tier = writer(path, f"{name}.host-memory", SLOTS, transport="cuda_ipc", memories=(self.kept,))
        self.table.publish(range(BLOCKS), KEYS[:BLOCKS])
        self._slot = 0
        self.stored: list[int] = []

    def store(self, blocks: Sequence[int], quality: int = 0) -> None:
        for block in blocks:
            slot, self._slot = self._slot, self._slot + 1
            for name, cache in self.memory.items():
                cache[slot] = self.device[name][block]
            self.tier.publish([slot], KEYS[block : block + 1], quality)
            self.stored.append(block)

    def block(self, number: int) -> bytes:
        return b"".join(cache[number].numpy().tobytes() for cache in self.device.values())

    @property
    def bytes(self) -> int:
        return len(self.block(0))

    def rows(self, count: int) -> np.ndarray:
        return np.full((count, self.bytes + 5), 0xEE, np.uint8)

    def close(self) -> None:
        self.table.close()
        self.tier.close()
