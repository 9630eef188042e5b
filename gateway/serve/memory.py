"""Memory of the gateway's process: what the garbage collector scans, and the size of pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

COLLECTOR_THRESHOLDS = (5_000, 10, 100)  # objects, then collections of the generation before
HUGE_PAGE_BYTES = 2 << 20
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_HUGEPAGE = 14  # of the kernel's mman-common.h
_MADV_COLLAPSE = 25  # since Linux 6.1


def settle_memory() -> None:
    """Call once, when all long-lived objects exist and before requests arrive."""
    _spare_the_collector()
    _use_huge_pages()


def _spare_the_collector() -> None:
    """Make the garbage collector pause requests less.

    Objects that exist by now stay, so scanning them again (0.1 s each time) is pointless. Later objects are freed by their
    reference counts, since no request leaves reference cycles behind. There is little to collect, so collections are rare;
    full ones, which take 40 ms with a full ledger, are the rarest.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _use_huge_pages() -> None:
    """Move the current heap into huge pages, unless the system forbids them. If that fails, nothing changes.

    A request touches objects all over the heap, which spans more small pages than the TLB has entries for.
    """
    with contextlib.suppress(AttributeError, OSError):  # Linux only
        if "[never]" in _HUGE_PAGES.read_text():
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start, end in huge_places(Path("/proc/self/maps").read_bytes()):
            madvise(start, end - start, _MADV_HUGEPAGE)
            for place in range(start, end, HUGE_PAGE_BYTES):
                madvise(place, HUGE_PAGE_BYTES, _MADV_COLLAPSE)


def huge_places(maps: bytes) -> Iterator[tuple[int, int]]:
    """Yield the [start, end) address ranges of the heap in /proc/<pid>/maps that huge pages could hold."""
    for line in maps.split(b"\n")[:-1]:
        addresses, mode, _, _, _, *name = line.split(maxsplit=5)
        if mode == b"rw-p" and name in ([], [b"[heap]"]):
            first, behind = (int(address, 16) for address in addresses.split(b"-"))
            start, end = -(-first // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, behind // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
            if start < end:
                yield start, end
