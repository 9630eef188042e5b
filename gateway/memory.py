"""How the gateway's process keeps memory: what the garbage collector looks at, and what malloc gives back to the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import gc

COLLECTOR_THRESHOLDS = (5_000, 10, 100)  # objects, then collections of the generation before
TRIM_BYTES = 16 << 20
"""Free memory that malloc keeps at the heap's end."""
MMAP_BYTES = 1 << 20
"""Smaller blocks come from the heap, larger ones from the kernel, and go back there."""
_M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
_M_MMAP_THRESHOLD = -3


def settle_memory() -> None:
    """Call it once, when all that stays is there, before requests come."""
    _spare_the_collector()
    _keep_freed_memory()


def _spare_the_collector() -> None:
    """Have the garbage collector stop requests for less time.

    What there is by now stays: it need not look at that again, 0.1 s each time. What comes later leaves by its reference
    counts, as no request leaves objects that refer to each other. So there is little to find, and it looks seldom: at
    everything, 40 ms with a full ledger, least of all.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _keep_freed_memory() -> None:
    """Have malloc keep what a body of some 100 KB took, for the next one.

    By default it goes back to the kernel each time, and each page of it is zeroed and faulted in anew: a quarter of the relay's
    time for a request with 220 KB.
    """
    with contextlib.suppress(AttributeError, OSError):  # of glibc alone
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
