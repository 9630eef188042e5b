"""Whether a table's owner is alive, according to the kernel: a write lock that ends with the process, however it ends.

An open-file-description lock (fcntl(2), F_OFD_SETLK) is held by the owner while its descriptor is open. Readers ask with
F_OFD_GETLK and never take it. Nothing has to be renewed, and a killed owner is seen as dead at once.
"""

import fcntl
import os
import struct

_FLOCK = struct.Struct("hhxxxxqqixxxx")
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
_UNLOCKED = struct.pack("h", fcntl.F_UNLCK)


def claim(fd: int) -> bool:
    """Lock the open file `fd` until it and all its duplicates are closed; False if somebody else holds the lock."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
    except (BlockingIOError, PermissionError):
        return False
    return True


def claimed(fd: int) -> bool:
    """Tell whether some process holds the lock on the open file `fd`."""
    return not fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE).startswith(_UNLOCKED)
