"""Requests that came together go on together: each step is done for one right behind the other.

All that is run for a request is more than a processor's inner caches hold, so that each step of a request by itself finds
neither its code nor its data there. A request waits at a few places until those of the same turn of the event loop have come
as far: then the next step is at hand for all but the first of them. That takes a sixth of the CPU time of a small request
(BENCHMARKS.md, "Where the time goes"). Who is alone does not wait.
"""

from __future__ import annotations

import asyncio


async def abreast() -> None:
    """Let the other tasks that can run come as far as this one; it goes on in the next turn of the event loop."""
    await asyncio.sleep(0)
