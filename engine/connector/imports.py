"""Imports under way: begun when vLLM has given a request its blocks, settled when every worker has reported."""

import logging
from collections.abc import Sequence as Blocks

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
        self._under_way: dict[str, tuple[Sequence, Import]] = {}
        self._partial: dict[str, ImportReport] = {}
        self._starting: list[ImportJob] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._under_way

    def begin(self, sequence: Sequence, plan: Import, targets: list[int], now_ns: int) -> None:
        """Import the first blocks of `plan` into `targets`."""
        request_id, count = sequence.request.request_id, len(targets)
        plan.target_blocks = int32_array(targets)
        plan.source_blocks, plan.states = plan.source_blocks[:count], plan.states[:count]
        self._under_way[request_id] = (sequence, plan)
        self._accounts.import_begun(sequence.account, plan.source, now_ns)
        self._starting.append(
            ImportJob(request_id, plan.source, plan.epoch, plan.source_blocks, plan.states, plan.target_blocks, plan.counts)
        )

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
        ended = []
        for request_id, part in report.imports.items():
            entry = self._under_way.get(request_id)
            if entry is None:
                continue
            earlier = self._partial.pop(request_id, None)
            whole = part.merged(earlier) if earlier else part
            entry[1].ranks_done += report.ranks[request_id]
            if entry[1].ranks_done < self._ranks:
                self._partial[request_id] = whole
                continue
            del self._under_way[request_id]
            self._end(*entry, whole, now_ns)
            ended.append(entry[1])
        return ended

    def checked(self, report: WorkerReport) -> list[tuple[Sequence, int]]:
        """Return of which requests more leading blocks are good than before, on all workers, and how many tokens they hold."""
        found = []
        for request_id, blocks in report.checked.items() if report.workers == self._ranks else ():
            sequence, plan = self._under_way.get(request_id, (None, None))
            if sequence is not None and plan is not None and plan.entered < blocks and not plan.counts:
                plan.entered = blocks
                found.append((sequence, plan.begin + blocks * self._groups.unit))
        return found

    def forget(self) -> None:
        """Settle none of the imports that are under way now."""
        self._under_way.clear()
        self._partial.clear()

    def _end(self, sequence: Sequence, plan: Import, report: ImportReport, now_ns: int) -> None:
        good = self._good_tokens(plan, report)
        # the blocks are offered onward with the request's first step, so that nobody waits for that
        self._accounts.import_ended(sequence.account, plan.begin, good, report, now_ns)
        failed, table = bool(report.failed_blocks), self._table
        blocks = good // self._groups.unit if not plan.counts else len(plan.source_blocks) if good else 0
        table.imported(
            plan.source,
            import_way(self._transport, plan.source),
            blocks=blocks,
            size=report.bytes,
            nanoseconds=report.nanoseconds,
            failed=failed,
        )
        table.count("imports")
        table.count("import_blocks", blocks)
        table.count("import_bytes", report.bytes)
        table.count("import_nanoseconds", report.nanoseconds)
        if report.failed_blocks and not report.bytes and not report.early:  # nothing was copied at all
            self._sources.not_read(plan.source, plan.epoch)
        if failed:
            table.count("check_failures", report.stale_blocks)
            table.count("fallbacks")
            _logger.info("import of %s from %s fell short: %s", sequence.request.request_id, plan.source, report.reason)

    def _good_tokens(self, plan: Import, report: ImportReport) -> int:
        """Return how many tokens it brought: of several groups all or none, as vLLM computes such a request from its begin."""
        if not report.failed_blocks:
            return plan.tokens if plan.counts else len(plan.target_blocks) * self._groups.unit
        targets = plan.target_blocks.tolist()
        good = next((place for place, block in enumerate(targets) if block in report.failed_blocks), len(targets))
        if plan.counts:
            return plan.tokens if good == len(targets) else 0
        return good * self._groups.unit
