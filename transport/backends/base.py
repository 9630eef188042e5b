"""The seam between an engine and the ways to read another replica's KV memory."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from transport.table.layout import Memory, Region

JobId = tuple[str, int]
"""A request's id, and which of its jobs it is."""


@dataclass(frozen=True, slots=True)
class ImportJob:
    """Copy `source_blocks` of replica `source` into our `target_blocks`; both int32 (n,).

    `states`, uint64 (n,), are what the source's table said when the blocks were looked up, in the epoch `epoch`. `counts` tells
    how many of the blocks are of each KV cache group, in the order of the groups; empty if the model has one. A request that
    imports from several sources has a job for each, numbered from 0 in the order of the prompt.
    """

    request_id: str
    source: str
    epoch: int
    source_blocks: npt.NDArray[np.int32]
    states: npt.NDArray[np.uint64]
    target_blocks: npt.NDArray[np.int32]
    counts: tuple[int, ...] = ()
    number: int = 0

    @property
    def id(self) -> JobId:
        return self.request_id, self.number

    def __len__(self) -> int:
        return len(self.source_blocks)

    def groups(self) -> list[slice]:
        """Return where each group's blocks are."""
        ends = list(itertools.accumulate(self.counts or (len(self),)))
        return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]

    def part(self, begin: int, end: int) -> "ImportJob":
        """Return the job of some of the blocks; of a model with one KV cache group."""
        some = slice(begin, end)
        return replace(
            self, source_blocks=self.source_blocks[some], states=self.states[some], target_blocks=self.target_blocks[some]
        )


@dataclass(frozen=True, slots=True)
class ImportResult:
    """How an import ended. `failed_blocks` are target blocks whose content must not be used; `reason` says why, "" if none.

    `early`: it came before the source's memory was open, which a later one may find open.
    """

    job: ImportJob
    failed_blocks: tuple[int, ...]
    stale_blocks: int
    bytes: int
    nanoseconds: int
    reason: str
    early: bool = False


class BlockSource(Protocol):
    """Whose blocks are copied: a table's reader, or what stands in for one. `memories` hold its `num_blocks` blocks."""

    @property
    def name(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def memories(self) -> tuple[Memory, ...]: ...
    def alive(self) -> bool: ...
    def unchanged(self, block_ids: npt.NDArray[np.int32], states: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]: ...
    def key(self, block: int) -> bytes: ...


Place = tuple[str, int, tuple[Region, ...]]
"""An owner's name and epoch, and the memory that its blocks are read from."""


def place_of(reader: BlockSource) -> Place:
    """Return where the blocks of `reader` are read.

    Name and epoch alone do not tell: a mirror of another node has its owner's epoch, but its blocks come to the memory of an
    agent, and to other memory once that was started again.
    """
    return reader.name, reader.epoch, tuple(region for memory in reader.memories for region in memory.regions)


def outdated(opened: Iterable[Place], live: set[tuple[str, int]]) -> set[Place]:
    """Return which of the places, told in the order in which they were opened, none of the `live` owners has any more."""
    newest = {place[:2]: place for place in opened}
    return {place for place in opened if place[:2] not in live or newest[place[:2]] != place}


class Transport(Protocol):
    """One rank's way to the KV memory of other replicas. All calls come from the engine's worker thread and return soon.

    An import never needs the owner: `start` begins to copy, `poll` goes on with it and, when all is copied,
    checks every block's state. Only blocks that passed count.
    """

    name: ClassVar[str]

    def memory(self) -> Memory:
        """Return where this rank's KV memory is, for the block table."""

    def prepare(self, reader: BlockSource) -> None:
        """Open an owner's memory ahead of the first import from it, which then does not wait for that.

        Memory that cannot be opened or has another shape is not an error here: `start` reports it.
        """

    def before_step(self) -> None:
        """The engine is about to enqueue a step in which imports will be started: they wait for what it enqueued until now.

        Not for the step itself: nothing in it touches their targets.
        """

    def start(self, job: ImportJob, reader: BlockSource, *, gently: bool) -> None:
        """Begin an import; `gently` if other requests are being computed beside it.

        Raises MemoryUnreachable if the owner's memory cannot be opened or has another shape.
        """

    def poll(self) -> list[ImportResult]:
        """Return the imports that ended since the last call, each exactly once."""

    def pending(self) -> int:
        """Return how many imports are under way."""

    def checked(self) -> dict[JobId, int]:
        """Return how many leading blocks of imports under way are copied and passed the check.

        They are good whatever becomes of the rest: `poll` does not report them as failed.
        """

    def ends_within(self, seconds: float) -> bool:
        """Tell whether an import under way is expected to end so soon, or to have ended so lately, that waiting pays."""

    def retain(self, live: set[tuple[str, int]]) -> None:
        """Close the memory of all owners but those (replica, epoch) that are `live` or being read."""

    def close(self) -> None:
        """Release everything."""
