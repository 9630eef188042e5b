"""The models whose replicas keep blocks in host memory here: read off the tables, kept for as long as this process runs."""

import threading
from collections.abc import Mapping

from engine.frame_tiers.model_frames import ModelFrames
from engine.frame_tiers.secrecy import OPEN, Secrecy
from transport.table.reader import TableReader
from transport.table.tiers import tier_kind

MODELS_MAX = 8


class Models:
    """Thread safe. `secrecy` is that of their frames."""

    def __init__(self, secrecy: Secrecy = OPEN) -> None:
        self._secrecy = secrecy
        self._known: dict[bytes, ModelFrames] = {}
        self._lock = threading.Lock()

    def note(self, tables: Mapping[str, TableReader]) -> None:
        """Learn of models from these tables."""
        for name, reader in tables.items():
            if tier_kind(name) == "host_memory" and reader.status == "ok" and reader.memories:
                with self._lock:
                    if reader.fingerprint not in self._known and len(self._known) < MODELS_MAX:
                        self._known[reader.fingerprint] = ModelFrames(reader.description, reader.block_size, self._secrecy)

    def find(self, fingerprint: bytes) -> ModelFrames | None:
        """Return the model with this fingerprint."""
        with self._lock:
            return self._known.get(fingerprint)
