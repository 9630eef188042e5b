"""Requests that arrive together proceed together: each step runs for all of them, one after another.

The code run for a request is larger than the processor's inner caches, so a step of a single request finds neither its code nor
its data there. At a few places a request waits until the others of the same turn of the event loop have come as far: then the
next step is in the cache for all but the first. Without it small requests on 32 connections took a tenth more CPU
time (two cores, 2026-11-29). A lone request does not wait.
"""

from __future__ import annotations

import types
from collections.abc import Generator

WAITING_MAX = 32
"""No more than this wait for each other: in a large burst the first would be sent as late as the last."""


class Batching:
    """One or more places at which requests wait for each other. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting = 0

    @types.coroutine
    def wait(self) -> Generator[None, None, None]:
        """Let the other runnable requests catch up with this one, which goes on in the next turn of the event loop."""
        if self._waiting >= WAITING_MAX:
            return
        self._waiting += 1
        try:
            yield  # as asyncio.sleep(0) does, by way of two more coroutines
        finally:
            self._waiting -= 1
