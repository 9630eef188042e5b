"""What the scheduler's half of a tier tells the workers' half: which blocks to copy where."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Store:
    """Copy the engine's `block`, of a KV cache group, into `slot`; `key` goes into the checksum."""

    block: int
    slot: int
    group: int
    key: bytes


@dataclass(frozen=True, slots=True)
class Stores:
    """Of one step: blocks to copy in the background, and those that the step overwrites, which are copied before it."""

    begun: tuple[Store, ...] = ()
    overwritten: frozenset[int] = frozenset()


NO_STORES = Stores()
