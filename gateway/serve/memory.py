"""How the gateway's process keeps memory: what the collector looks at, what malloc gives back, and the size of its pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

COLLECTOR_THRESHOLDS = (5_000, 10, 100)  # objects, then collections of the generation before
TRIM_BYTES = 16 << 20
"""Free memory that malloc keeps at the heap's end."""
MMAP_BYTES = 1 << 20
"""Smaller blocks come from the heap, larger ones from the kernel, and go back there."""
HUGE_PAGE_BYTES = 2 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE = 14  # of the kernel's mman-common.h
_MADV_COLLAPSE = 25  # since Linux 6.1
_M_TRIM_THRESHOLD = -1  # of glibc's malloc.h
_M_MMAP_THRESHOLD = -3


def settle_memory() -> None:
    """Call it once, when all that stays is there, before requests come."""
    _spare_the_collector()
    _keep_freed_memory()
    _use_huge_pages()


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


def _use_huge_pages() -> None:
    """Put what there is by now into huge pages, unless the system is set to have none; where that fails all stays as it is.

    A request touches objects all over the heap, whose small pages are more than a processor remembers the places of.
    """
    with contextlib.suppress(AttributeError, OSError):  # of Linux alone
        if "[never]" in _HUGE_PAGES.read_text():
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in huge_places(Path("/proc/self/maps").read_bytes()):
            madvise(start, end - start, _MADV_HUGEPAGE)
            for place in range(start, end, HUGE_PAGE_BYTES):
                madvise(place, HUGE_PAGE_BYTES, _MADV_COLLAPSE)


def huge_places(maps: bytes) -> Iterator[tuple[int, int]]:
    """Yield addresses, first and behind the last, of what of the heap in /proc/<pid>/maps huge pages could hold."""
    for line in maps.split(b"\n")[:-1]:
        addresses, mode, _, _, _, *name = line.split(maxsplit=5)
        if mode == b"rw-p" and name in ([], [b"[heap]"]):
            first, behind = (int(address, 16) for address in addresses.split(b"-"))
            start, end = -(-first // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, behind // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
            if start < end:
                yield start, end
