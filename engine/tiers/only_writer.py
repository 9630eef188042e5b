"""At most one engine writes a replica's host memory: the kernel drops its lock when it ends, however it ends."""

import os
import time

from transport.backends.shared_memory import open_region
from transport.errors import MemoryUnreachable
from transport.table import liveness
from transport.table.layout import Region

WAIT_SECONDS_MAX = 5.0
POLL_SECONDS = 0.02


def become_only_writer(region: Region, wait_seconds: float = WAIT_SECONDS_MAX) -> int:
    """Return a descriptor with the lock, for this process to keep; waits for an engine that is just being ended.

    Raises MemoryUnreachable if the memory does not open or another engine goes on writing it.
    """
    fd = open_region(region, writable=True)
    deadline = time.monotonic() + wait_seconds
    while not liveness.claim(fd):
        if time.monotonic() > deadline:
            os.close(fd)
            raise MemoryUnreachable("another engine still writes this replica's host memory")
        time.sleep(POLL_SECONDS)
    return fd
