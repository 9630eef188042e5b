"""Host memory of tiers as a GPU reads and writes it: mapped into this process and registered with CUDA.

A kernel then reaches it by its address, over PCIe, as it does a peer's memory over NVLink. Registering takes a second for some
gigabytes, all of whose pages it takes from the system: it belongs into a thread of its own.
"""

import ctypes
import mmap
import threading
from dataclasses import dataclass

import numpy as np
from cuda.bindings import runtime

from transport.backends.shared_memory import map_region
from transport.errors import MemoryUnreachable
from transport.table.layout import Region

SEGMENT_BYTES = 256 << 20
"""Registered at once: whatever else needs the driver or the process' memory map meanwhile waits for one segment at most."""
_MADV_POPULATE_WRITE = 23


@dataclass(slots=True)
class _Mapped:
    mapping: mmap.mmap
    address: int
    segments: tuple[int, ...]
    users: int = 0


_Part = tuple[str, int, int]


class HostRegions:
    """What is registered, each part of a region once however many use it. All calls come from one thread, but `stop`."""

    def __init__(self) -> None:
        self._mapped: dict[_Part, _Mapped] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Have an `open` that is under way end soon, by raising MemoryUnreachable, and any later one at once."""
        self._stopped.set()

    def open(self, region: Region, begin: int, end: int) -> int:
        """Return the address of a region for kernels on this process' device, which may use it from byte `begin` to `end`.

        `close` the part as often as it was opened. Raises MemoryUnreachable, with what to change, if it does not open or cannot
        be registered.
        """
        part = (region.handle, begin, end)
        known = self._mapped.get(part)
        if known is None:
            mapping = map_region(region, writable=True)
            base = int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])
            try:
                first = begin // mmap.PAGESIZE * mmap.PAGESIZE
                shift, segments = self._register(base + first, base + end)
            except BaseException:
                mapping.close()
                raise
            known = self._mapped[part] = _Mapped(mapping, base + shift, segments)
        known.users += 1
        return known.address

    def close(self, region: Region, begin: int, end: int) -> None:
        """Let go of a part that was opened; no kernel may use it any more if that was its last user."""
        known = self._mapped[region.handle, begin, end]
        known.users -= 1
        if not known.users:
            del self._mapped[region.handle, begin, end]
            _unregister(known.segments)
            known.mapping.close()

    def _register(self, first: int, end: int) -> tuple[int, tuple[int, ...]]:
        """Register from one address to another; return how far off they are for a device, and the segments."""
        segments: list[int] = []
        shifts: set[int] = set()
        try:
            for begin in range(first, end, SEGMENT_BYTES):
                if self._stopped.is_set():
                    raise MemoryUnreachable("the engine ends")
                length = min(SEGMENT_BYTES, end - begin)
                # outside the driver, which would hold its locks while the pages are made; registering meets what fails here
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)
                shifts.add(_pin(begin, length, segments) - begin)
            if len(shifts) != 1:
                raise MemoryUnreachable("this GPU sees registered host memory in pieces: host memory cannot be used here")
        except BaseException:
            _unregister(segments)
            raise
        return shifts.pop(), tuple(segments)


def _pin(begin: int, length: int, segments: list[int]) -> int:
    """Register a segment, note it, and return its address for the device."""
    (status,) = runtime.cudaHostRegister(begin, length, runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterMapped)
    if status != runtime.cudaError_t.cudaSuccess:
        runtime.cudaGetLastError()  # or the next call of torch in this thread would raise it
        raise MemoryUnreachable(
            f"CUDA cannot pin more than {len(segments) * SEGMENT_BYTES >> 20} MiB of host memory ({status.name}): ask for less"
            " by --host-memory, or allow more (ulimit -l, the memory of the container)"
        )
    segments.append(begin)
    status, address = runtime.cudaHostGetDevicePointer(begin, 0)
    if status != runtime.cudaError_t.cudaSuccess:
        raise MemoryUnreachable(f"CUDA gives this GPU no address of host memory ({status.name})")
    return int(address)


def _unregister(segments: list[int] | tuple[int, ...]) -> None:
    for begin in segments:
        runtime.cudaHostUnregister(begin)
