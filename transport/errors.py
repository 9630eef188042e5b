"""What can go wrong between replicas. Every one of them is answered by recomputing the blocks in question."""

import errno

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Errors of this process or this machine: they say nothing about the replica or the table that was asked for."""


class TransportError(Exception):
    """Base of this package's errors."""


class TableError(TransportError):
    """A block table cannot be used (absent, foreign, truncated, of another version): treat its replica as holding nothing."""


class MemoryUnreachable(TransportError):
    """The owner's KV memory cannot be opened from here: import nothing from it until its next epoch."""
