"""What can go wrong between replicas. Every one of them is answered by recomputing the blocks in question."""

import errno

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Errors of this process or this machine: they say nothing about the replica or the table that was asked for."""


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error is such a shortage, of descriptors, memory or threads: it passes."""
    if isinstance(error, OSError):
        return error.errno in SHORTAGES
    # CPython has no class of its own for a thread that cannot be started
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "start new thread" in str(error))


class TransportError(Exception):
    """Base of this package's errors."""


class TableError(TransportError):
    """A block table cannot be used (absent, foreign, truncated, of another version): treat its replica as holding nothing."""


class MemoryUnreachable(TransportError):
    """The owner's KV memory cannot be opened from here: import nothing from it until its next epoch."""
