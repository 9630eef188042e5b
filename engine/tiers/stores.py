"""What the scheduler's half of a tier tells the workers' half: which blocks to copy where."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Store:
    """Copy the engine's `block`, of a KV cache group, into `slot`; `key` goes into the checksum.

    `quality` are the bits of transport/table/quality.py that it is offered with.
    """

    block: int
    slot: int
    group: int
    key: bytes
    quality: int = 0


@dataclass(frozen=True, slots=True)
class Stores:
    """Of one step: blocks to copy in the background, and those that the step overwrites, which are copied before it.

    Of the latter `lost` cannot be on a GPU: vLLM overwrites them there before it tells of the step. `imported` are overwritten
    by imports that begin in the step, and by nothing else in it: the imports alone wait for their copies. `at_once`: all copies
    are begun in this step, which may be the last one for long, or brings what another node waits for.
    """

    begun: tuple[Store, ...] = ()
    overwritten: frozenset[int] = frozenset()
    lost: frozenset[int] = frozenset()
    imported: frozenset[int] = frozenset()
    at_once: bool = False


NO_STORES = Stores()


class Writer(Protocol):
    """Writes one rank's slots. All calls come from the engine's worker thread and return soon."""

    def begin(self, stores: Stores) -> None:
        """Take in what a step brings; what the engine overwrites after this returned has been copied before, or is not."""

    def take_copied(self) -> list[int]:
        """Return the slots that were filled since the last call."""

    def take_lost(self) -> list[int]:
        """Return the slots that will not be filled, once."""

    def close(self) -> None:
        """End the copies: the engine's memory may go then."""
