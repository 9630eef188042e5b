"""NIXL as far as we use it: its bindings themselves, since its Python API has each idle agent burn a core and uses pickle."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

PROGRESS_MICROSECONDS = 100_000
"""How long NIXL's thread waits for something to do; with 0, as its Python API has it, it does not wait but ask."""
BACKEND = "UCX"

Spans = npt.NDArray[np.uint64]
"""(n, 2): addresses and bytes."""


class NixlAgent:
    """NIXL's agent `name` in this process, which can have one `package` of NIXL. Raises what NIXL raises.

    Belongs to one thread.
    """

    def __init__(self, package: str, name: str) -> None:
        self._nixl: Any = importlib.import_module(f"{package}._bindings")
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = PROGRESS_MICROSECONDS
        self._agent = self._nixl.nixlAgent(name, config)
        self._backends = [self._agent.createBackend(BACKEND, {})]

    def register(self, address: int, size: int) -> None:
        """Let the memory be read by others, or be read into."""
        self._agent.registerMem(self._memory([(address, size)]), self._backends)

    def deregister(self, address: int, size: int) -> None:
        """Undo `register`."""
        self._agent.deregisterMem(self._memory([(address, size)]), self._backends)

    def metadata(self, memory: Sequence[tuple[int, int]]) -> bytes:
        """Return what another agent has to know to read these parts (address, bytes), each registered."""
        return bytes(self._agent.getLocalPartialMD(self._memory(memory), True, self._backends))

    def know(self, metadata: bytes) -> str:
        """Take in another agent's metadata, and return its name."""
        name = self._agent.loadRemoteMD(metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def forget(self, agent: str) -> None:
        """Undo `know`."""
        self._agent.invalidateRemoteMD(agent)

    def prepare(self, agent: str, here: Spans, there: Spans) -> int:
        """Return a read of `there`, in another agent's memory, into `here`; nothing is sent yet."""
        return int(
            self._agent.createXferReq(self._nixl.NIXL_READ, self._list(here), self._list(there), agent, "", self._backends)
        )

    def begin(self, read: int) -> None:
        """Begin a read."""
        self._agent.postXferReq(read)

    def over(self, read: int) -> bool:
        """Tell whether a read has written all that it will write."""
        return bool(self._agent.getXferStatus(read) == self._nixl.NIXL_SUCCESS)

    def release(self, read: int) -> None:
        """A read that is over, or never began, is not needed any more."""
        self._agent.releaseXferReq(read)

    def _memory(self, memory: Sequence[tuple[int, int]]) -> Any:
        return self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, size, 0, "") for address, size in memory])

    def _list(self, spans: Spans) -> Any:
        rows = np.zeros((len(spans), 3), np.uint64)
        rows[:, :2] = spans
        return self._nixl.nixlXferDList(self._nixl.DRAM_SEG, rows)
