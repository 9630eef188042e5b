"""What can go wrong between replicas. Every one of them is answered by recomputing the blocks in question."""


class TransportError(Exception):
    """Base of this package's errors."""


class TableError(TransportError):
    """A block table cannot be used (absent, foreign, truncated, of another version): treat its replica as holding nothing."""


class MemoryUnreachable(TransportError):
    """The owner's KV memory cannot be opened from here: import nothing from it until its next epoch."""
