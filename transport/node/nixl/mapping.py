"""Memory of other processes at an address that stays ours: what others may still read must not become anything else."""

import ctypes
import mmap
import os

from transport.backends.shared_memory import open_region
from transport.errors import MemoryUnreachable
from transport.table.layout import Region

_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Mapping:
    """`size` bytes of a region at `address`. Raises MemoryUnreachable."""

    def __init__(self, region: Region, *, writable: bool) -> None:
        self.size = region.size
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        fd = open_region(region, writable=writable)
        try:
            self.address = _mapped(None, region.size, access, mmap.MAP_SHARED, fd)
        finally:
            os.close(fd)

    def vanish(self) -> None:
        """Let go of the memory: who reads its addresses from now on reads zeros, and does not fault."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        _mapped(self.address, self.size, mmap.PROT_READ, flags, -1)

    def close(self) -> None:
        """Let go of the addresses, too."""
        _libc.munmap(self.address, self.size)


def _mapped(address: int | None, size: int, access: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, size, access, flags, fd, 0)
    if found == _FAILED:
        raise MemoryUnreachable(f"{size} bytes cannot be mapped: {os.strerror(ctypes.get_errno())}")
    return int(found)
