"""A replica host's memories, for tests: they end with whoever made them, and not with the process."""

import os

from engine.host_process.kept_memory import KeptMemories


class Keeper(KeptMemories):
    """To be referred to for as long as its memories are used."""

    def __del__(self) -> None:
        self.end()

    def end(self) -> None:
        """Let go of everything, as the host's end does."""
        for descriptor in self.descriptors():
            os.close(descriptor)
        self._memory.clear()
        self._locks.clear()
