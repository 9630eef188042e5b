"""What the connector's scheduler and worker halves tell each other, once per step, through vLLM's own channel."""

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from engine.tiers.slots import Slots
from engine.tiers.stores import NO_STORES, Stores
from transport.backends.base import ImportJob
from transport.table.layout import Memory


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """Scheduler to workers: the number of this step, the imports to begin in it, whether it computes anything, and what goes
    into host memory."""

    step: int
    imports: tuple[ImportJob, ...] = ()
    computes: bool = False
    stores: Stores = NO_STORES


@dataclass(frozen=True)
class ImportReport:
    """How one rank's import ended: target blocks that must not be used, blocks that changed, bytes copied, nanoseconds.

    `early`: the source was not there, or its memory not open yet, and may be for a later one. An import from several sources
    has a report for each: this is that of the first, and `further` are the others, in order.
    """

    failed_blocks: frozenset[int]
    stale_blocks: int
    bytes: int
    nanoseconds: int
    reason: str
    early: bool = False
    further: tuple["ImportReport", ...] = ()

    def by_source(self) -> tuple["ImportReport", ...]:
        """Return the reports of all sources."""
        return (self, *self.further)

    def merged(self, other: "ImportReport") -> "ImportReport":
        """Combine two ranks' reports of one import: as bad as the worse one, as slow as the slower one."""
        return ImportReport(
            self.failed_blocks | other.failed_blocks,
            max(self.stale_blocks, other.stale_blocks),
            self.bytes + other.bytes,
            max(self.nanoseconds, other.nanoseconds),
            self.reason or other.reason,
            self.early or other.early,
            tuple(mine.merged(theirs) for mine, theirs in zip(self.further, other.further, strict=True)),
        )


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Workers to scheduler: the work of `step` is done; the imports that ended, by request id, and on how many ranks.

    `unmapped`: the KV memory that was shared is gone, as after vLLM's sleep. `copied`: the slots of host memory that are done
    with, and on how many ranks; those that are `lost` were not filled on all. `checked`: how many leading blocks of imports
    under way are good on all of the `workers` that report together.
    """

    step: int
    imports: dict[str, ImportReport] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    unmapped: bool = False
    copied: dict[int, int] = field(default_factory=dict)
    lost: frozenset[int] = frozenset()
    checked: dict[str, int] = field(default_factory=dict)
    workers: int = 1

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        assert isinstance(other, WorkerReport)
        unmapped = self.unmapped or other.unmapped
        step, lost = min(self.step, other.step), self.lost | other.lost
        merged = WorkerReport(step, dict(self.imports), dict(self.ranks), unmapped, dict(self.copied), lost)
        merged.checked = {each: min(self.checked[each], other.checked[each]) for each in self.checked.keys() & other.checked}
        merged.workers = self.workers + other.workers
        for slot, ranks in other.copied.items():
            merged.copied[slot] = merged.copied.get(slot, 0) + ranks
        for request_id, report in other.imports.items():
            mine = merged.imports.get(request_id)
            merged.imports[request_id] = mine.merged(report) if mine else report
            merged.ranks[request_id] = merged.ranks.get(request_id, 0) + other.ranks[request_id]
        return merged


@dataclass
class Handshake(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Workers to scheduler, once: where a rank's KV memory is, or in `status` why nobody can read it, and what it saw.

    `host_memory` are its slots, or why it has none; "" if none were asked for.
    """

    memory: Memory | None
    status: str
    fields: dict[str, str]
    host_memory: Slots | str = ""
