"""Requests that came together go on together: each step is done for one right behind the other.

All that is run for a request is more than a processor's inner caches hold, so that each step of a request by itself finds
neither its code nor its data there. A request waits at a few places until those of the same turn of the event loop have come
as far: then the next step is at hand for all but the first of them. That takes a sixth of the CPU time of a small request
(BENCHMARKS.md, "Where the time goes"). Who is alone need not wait.
"""

from __future__ import annotations

import types
from collections.abc import Generator

WAITING_MAX = 32
"""More do not wait for each other: of a great burst the first would be sent as late as the last."""


class Batching:
    """A place, or some, at which requests wait for each other. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting = 0

    @types.coroutine
    def wait(self) -> Generator[None, None, None]:
        """Let the other requests that can run come as far as this one; it goes on in the next turn of the event loop."""
        if self._waiting >= WAITING_MAX:
            return
        self._waiting += 1
        try:
            yield  # as asyncio.sleep(0) does, by way of two more coroutines
        finally:
            self._waiting -= 1
