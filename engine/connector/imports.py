"""Imports under way: begun when vLLM has given a request its blocks, settled when every worker has reported."""

import logging
from collections.abc import Sequence as Blocks
from dataclasses import dataclass

import numpy as np

from engine.connector.import_sources import Peers
from engine.connector.request_accounts import RequestAccounts
from engine.connector.sequence import Import, Sequence
from engine.connector.step_messages import ImportReport, WorkerReport
from engine.connector.vllm_groups import ModelGroups
from transport.backends.base import ImportJob
from transport.int32 import int32_array
from transport.node.source_way import import_way
from transport.table.writer import TableWriter

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _UnderWay:
    """A request's imports: they begin together and are done together, when all `ranks_done` have reported them.

    `entered` are the leading blocks that vLLM may already use.
    """

    sequence: Sequence
    parts: tuple[Import, ...]
    ranks_done: int = 0
    entered: int = 0


class Imports:
    """`groups` are the model's, `ranks` the number of workers that must report an import before it is done."""

    def __init__(
        self, table: TableWriter, accounts: RequestAccounts, sources: Peers, *, groups: ModelGroups, transport: str, ranks: int
    ) -> None:
        self._table = table
        self._accounts = accounts
        self._sources = sources
        self._groups = groups
        self._transport = transport
        self._ranks = ranks
        self._under_way: dict[str, _UnderWay] = {}
        self._partial: dict[str, ImportReport] = {}
        self._starting: list[ImportJob] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._under_way

    def begin(self, sequence: Sequence, parts: tuple[Import, ...], targets: Blocks[list[int]], now_ns: int) -> None:
        """Import the first blocks of each of `parts` into its `targets`."""
        request_id, jobs = sequence.request.request_id, []
        for number, (part, blocks) in enumerate(zip(parts, targets, strict=True)):
            part.target_blocks, count = int32_array(blocks), len(blocks)
            part.source_blocks, part.states = part.source_blocks[:count], part.states[:count]
            source = (part.source, part.epoch, part.source_blocks, part.states)
            jobs.append(ImportJob(request_id, *source, part.target_blocks, part.counts, number))
        self._under_way[request_id] = _UnderWay(sequence, parts)
        self._accounts.import_begun(sequence.account, parts[0].source, now_ns)
        self._starting += jobs

    def give_up(self, request_id: str, block_ids: Blocks[Blocks[int]], tokens: int) -> None:
        """Make the workers report an import of `tokens` tokens as failed: it cannot begin without a source."""
        plain = self._groups.plain
        targets = block_ids[0][-(tokens // self._groups.unit) :] if plain else [block for ids in block_ids for block in ids]
        blocks, count = int32_array(targets), len(targets)
        none, counts = np.zeros(count, np.int32), () if plain else tuple(map(len, block_ids))
        self._starting.append(ImportJob(request_id, "", 0, none, np.zeros(count, np.uint64), blocks, counts))

    def take_starting(self) -> tuple[ImportJob, ...]:
        """Return the imports to begin in this step, each once."""
        starting, self._starting = tuple(self._starting), []
        return starting

    def settle(self, report: WorkerReport, now_ns: int) -> list[Import]:
        """Count the imports that every worker has reported, and record how much of each is good; return them."""
        ended: list[Import] = []
        for request_id, some in report.imports.items():
            entry = self._under_way.get(request_id)
            if entry is None:
                continue
            earlier = self._partial.pop(request_id, None)
            whole = some.merged(earlier) if earlier else some
            entry.ranks_done += report.ranks[request_id]
            if entry.ranks_done < self._ranks:
                self._partial[request_id] = whole
                continue
            del self._under_way[request_id]
            self._end(entry, whole, now_ns)
            ended += entry.parts
        return ended

    def checked(self, report: WorkerReport) -> list[tuple[Sequence, int]]:
        """Return of which requests more leading blocks are good than before, on all workers, and how many tokens they hold."""
        found = []
        for request_id, blocks in report.checked.items() if report.workers == self._ranks else ():
            entry = self._under_way.get(request_id)
            if entry is not None and entry.entered < blocks and not entry.parts[0].counts:
                entry.entered = blocks
                found.append((entry.sequence, entry.parts[0].begin + blocks * self._groups.unit))
        return found

    def forget(self) -> None:
        """Settle none of the imports that are under way now."""
        self._under_way.clear()
        self._partial.clear()

    def _end(self, entry: _UnderWay, report: ImportReport, now_ns: int) -> None:
        """Settle a request's imports. What comes behind a block that is not good is not used, be it good itself or not."""
        brought, whole = [], True
        for part, told in zip(entry.parts, report.by_source(), strict=True):
            tokens = self._good_tokens(part, told) if whole else 0
            whole &= not told.failed_blocks
            brought.append((part.source, tokens))
            self._count(entry.sequence, part, told, tokens)
        # the blocks are offered onward with the request's first step, so that nobody waits for that
        self._accounts.import_ended(entry.sequence.account, entry.parts[0].begin, brought, report, now_ns)
        if not whole:
            self._table.count("fallbacks")

    def _count(self, sequence: Sequence, part: Import, told: ImportReport, good: int) -> None:
        """Count an import from one source, of which `good` tokens are used."""
        table = self._table
        blocks = good // self._groups.unit if not part.counts else len(part.source_blocks) if good else 0
        table.imported(
            part.source,
            import_way(self._transport, part.source),
            blocks=blocks,
            size=told.bytes,
            nanoseconds=told.nanoseconds,
            failed=bool(told.failed_blocks),
        )
        table.count("imports")
        table.count("import_blocks", blocks)
        table.count("import_bytes", told.bytes)
        table.count("import_nanoseconds", told.nanoseconds)
        if not told.failed_blocks:
            return
        if not told.bytes and not told.early:  # nothing was copied at all
            self._sources.not_read(part.source, part.epoch)
        table.count("check_failures", told.stale_blocks)
        _logger.info("import of %s from %s fell short: %s", sequence.request.request_id, part.source, told.reason)

    def _good_tokens(self, part: Import, told: ImportReport) -> int:
        """Return how many tokens it brought: of several groups all or none, as vLLM computes such a request from its begin."""
        if not told.failed_blocks:
            return part.tokens if part.counts else len(part.target_blocks) * self._groups.unit
        targets = part.target_blocks.tolist()
        good = next((place for place, block in enumerate(targets) if block in told.failed_blocks), len(targets))
        if part.counts:
            return part.tokens if good == len(targets) else 0
        return good * self._groups.unit
