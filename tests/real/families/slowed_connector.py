"""peerkv's connector in an engine whose copies take a piece of a block each POLL_SECONDS, so that kills land within them."""

import time

from engine.connector.peerkv_connector import PeerKVConnector
from transport.backends import shared_memory
from transport.backends.base import ImportResult

__all__ = ["PeerKVConnector"]

POLL_SECONDS = 0.05
_poll = shared_memory.SharedMemoryTransport.poll


def _slowed(transport: shared_memory.SharedMemoryTransport) -> list[ImportResult]:
    if transport.pending():
        time.sleep(POLL_SECONDS)
    return _poll(transport)


shared_memory.PIECE_BYTES_MAX = 1
shared_memory.SLICE_SECONDS = 0.0
shared_memory.SharedMemoryTransport.poll = _slowed  # type: ignore[method-assign]
