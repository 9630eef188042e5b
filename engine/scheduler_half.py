"""The connector's scheduler half: what to import, what to offer, and when a block's offer must end.

It owns the replica's block table. Plain code over plain values: vLLM's objects are only read, and `engine.connector` keeps any
exception from reaching vLLM.
"""

import logging
import time
from array import array
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from engine.messages import ImportReport, StepMetadata, WorkerReport
from engine.sequence import Import, Sequence, extra_content
from transport.adapter import adapter_identity
from transport.base import ImportJob
from transport.directory import TableDirectory
from transport.fingerprint import fingerprint_difference
from transport.keys import KeyChain, root_key
from transport.table import TableReader
from transport.table_writer import TableWriter

_logger = logging.getLogger(__name__)

HINT = "peerkv"
"""The key of `kv_transfer_params` that carries the gateway's hint: {"source": replica name, or "" for no import}."""


_NEVER = 1 << 60
UNREADABLE_MAX = 3
"""After so many imports of which nothing could be read, an owner is not asked again in its epoch."""


class BlockPool(Protocol):
    """The one thing that is read of vLLM's block pool: this map is replaced when the prefix cache is reset."""

    cached_block_hash_to_block: Any


class SchedulerHalf:
    """Keeps `table` true and plans imports from `peers`.

    `block_size` is in tokens, `ranks` the number of workers that must report an import before it is done.
    """

    def __init__(
        self,
        table: TableWriter,
        peers: TableDirectory,
        fingerprint: bytes,
        fields: dict[str, str],
        *,
        block_size: int,
        hash_name: str,
        transport: str,
        status: str,
        ranks: int = 1,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.table = table
        self._peers = peers
        self._fingerprint = fingerprint
        self._fields = fields
        self._block_size = block_size
        self._hash_name = hash_name
        self._transport = transport
        self._exchanges = status == "ok"
        self._ranks = ranks
        self._clock_ns = clock_ns
        self._pool: BlockPool | None = None
        self._pool_map: Any = None
        self._sequences: dict[str, Sequence] = {}
        self._imports: dict[str, tuple[Sequence, Import]] = {}
        self._partial: dict[str, ImportReport] = {}
        self.starting: list[ImportJob] = []
        self._steps: deque[tuple[int, list[tuple[Sequence, int]]]] = deque()
        self._step = 0
        self._allocated = array("q", bytes(8 * table.layout.blocks))
        self._refused: set[tuple[str, int]] = set()
        self._unreadable: dict[tuple[str, int], int] = {}
        self._adapters: dict[tuple[str, str], str] = {}

    # What vLLM asks while it schedules

    def bind_pool(self, pool: BlockPool) -> None:
        """Remember the pool, to notice a reset of the prefix cache."""
        self._pool = pool
        self._pool_map = pool.cached_block_hash_to_block

    def match(self, request: Any, computed_tokens: int) -> int:
        """Return how many tokens beyond `computed_tokens` a peer can supply; plan the import but change nothing else."""
        self._notice_reset()  # here already: later it would take the import that is being planned for one of before
        sequence = self._sequence(request)
        if sequence is None or sequence.tried or not self._exchanges or request.skip_reading_prefix_cache:
            return 0
        size = self._block_size
        local = computed_tokens // size
        keys = sequence.keys((request.num_tokens - 1) // size)[local:]
        sequence.planned = None
        if sequence.source == "" or not len(keys):
            return 0
        best = 0
        for reader in self._candidates(sequence.source):
            run = reader.longest_run(keys)
            if len(run) > best:
                best = len(run)
                sequence.planned = Import(reader.name, reader.epoch, local, run.block_ids, run.states)
        return best * size

    def allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> bool:
        """Begin the import of a request that vLLM gave blocks to; False if there is nothing to begin."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return False
        plan = sequence.planned
        sequence.planned = None
        sequence.tried = True
        count = external_tokens // self._block_size
        if plan is None or len(plan.source_blocks) < count or plan.local_blocks + count > len(block_ids):
            self.give_up(request.request_id, block_ids, external_tokens)
            return True
        targets = block_ids[plan.local_blocks : plan.local_blocks + count]
        self._reallocated(targets, self._step + 1)
        plan.target_blocks = np.array(targets, np.int32)
        plan.source_blocks, plan.states = plan.source_blocks[:count], plan.states[:count]
        self._imports[request.request_id] = (sequence, plan)
        self.starting.append(
            ImportJob(request.request_id, plan.source, plan.epoch, plan.source_blocks, plan.states, plan.target_blocks)
        )
        return True

    def give_up(self, request_id: str, block_ids: list[int], external_tokens: int) -> None:
        """Have the workers report an import as failed that can not be begun: with no source to read from."""
        targets = np.array(block_ids[-(external_tokens // self._block_size) :], np.int32)
        count = len(targets)
        self.starting.append(ImportJob(request_id, "", 0, np.zeros(count, np.int32), np.zeros(count, np.uint64), targets))

    def step(self, output: Any) -> StepMetadata:
        """Close a scheduling step: end the offers of blocks that it gave away, note what it will have computed."""
        self._step += 1
        self._notice_reset()
        work: list[tuple[Sequence, int]] = []
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            sequence = self._sequences.get(new.req_id)
            blocks = list(new.block_ids[0])
            self._reallocated(blocks[new.num_computed_tokens // self._block_size :], self._step)
            if sequence is not None:
                sequence.block_ids, sequence.published = blocks, 0
                self._count(sequence, new.num_computed_tokens)
                work.append((sequence, new.num_computed_tokens + scheduled.get(new.req_id, 0)))
        self._step_cached(output.scheduled_cached_reqs, scheduled, work)
        self._steps.append((self._step, work))
        self.table.beat(self._clock_ns())
        return StepMetadata(self._step, self.take_starting(), bool(scheduled))

    def take_starting(self) -> tuple[ImportJob, ...]:
        """Return the imports to begin in this step, each once."""
        starting, self.starting = tuple(self.starting), []
        return starting

    def _step_cached(self, cached: Any, scheduled: dict[str, int], work: list[tuple[Sequence, int]]) -> None:
        """Note the requests that run on. Nothing is done for one that neither got nor filled a block."""
        size, sequences = self._block_size, self._sequences
        for request_id, computed, added in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            sequence = sequences.get(request_id)
            if added and added[0]:
                blocks = list(added[0])
                resumed = request_id in cached.resumed_req_ids
                self._reallocated(blocks[computed // size :] if resumed else blocks, self._step)
                if sequence is not None and resumed:
                    sequence.block_ids, sequence.published = blocks, 0
                elif sequence is not None:
                    sequence.block_ids += blocks
            if sequence is not None:
                end = computed + scheduled.get(request_id, 0)
                if end // size > sequence.published:
                    work.append((sequence, end))

    # What vLLM tells when a step is over

    def report(self, report: WorkerReport) -> None:
        """Offer the blocks that became full up to the reported step, and settle the imports that ended."""
        while self._steps and self._steps[0][0] <= report.step:
            step, work = self._steps.popleft()
            for sequence, end in work:
                # the KV of the newest token is not computed yet; rejected drafts never reach all_token_ids
                computed = min(end, len(sequence.request.all_token_ids) - 1)
                self._publish(sequence, computed // self._block_size, step)
        for request_id, part in report.imports.items():
            self._settle(request_id, part, report.ranks[request_id])

    def finished(self, request_id: str) -> None:
        """Forget a request; what its last step computed is still offered when that step is reported."""
        self._sequences.pop(request_id, None)

    def reset(self) -> None:
        """Withdraw everything: the prefix cache was reset, and what runs on was computed before that."""
        if self._pool is not None:
            self._pool_map = self._pool.cached_block_hash_to_block
        self.table.count("evictions", self.table.clear())
        self._steps = deque((step, []) for step, _ in self._steps)
        self._imports.clear()
        self._partial.clear()
        for sequence in self._sequences.values():
            sequence.published = _NEVER

    def withdraw(self) -> None:
        """Offer and import nothing any more: a fault left the table in doubt."""
        self._exchanges = False
        self.reset()
        self.table.count("table_errors")

    def close(self) -> None:
        """End the table's epoch and close the peers' tables."""
        self.table.close()
        self._peers.close()

    # Inside

    def _sequence(self, request: Any) -> Sequence | None:
        known = self._sequences.get(request.request_id)
        if known is not None:
            return known
        if request.pooling_params is not None or request.prompt_embeds is not None or getattr(request, "resumable", False):
            return None  # no text that a key could stand for, or text that may be replaced
        lora = request.lora_request
        if lora is not None and getattr(lora, "load_inplace", False):
            return None  # an adapter that replaces its own content
        adapter = self._adapter(lora.lora_name, lora.lora_path) if lora else ""
        root = root_key(self._fingerprint, request.cache_salt or "", adapter, self._hash_name)
        sequence = Sequence(
            request,
            KeyChain(root, self._block_size, self._hash_name),
            extra_content(request, self._block_size),
            _hinted_source(request.kv_transfer_params),
        )
        self._sequences[request.request_id] = sequence
        return sequence

    def _adapter(self, name: str, path: str) -> str:
        """Return how keys name an adapter: as its files were when this engine first saw it."""
        known = self._adapters.get((name, path))
        if known is None:
            known = self._adapters[name, path] = adapter_identity(name, path)
        return known

    def _candidates(self, source: str | None) -> list[TableReader]:
        tables = self._peers.tables()
        names = tables if source is None else (source,)
        readers = [tables[name] for name in names if name in tables and self._exchanges_with(tables[name])]
        return [reader for reader in readers if self._unreadable.get((reader.name, reader.epoch), 0) < UNREADABLE_MAX]

    def _exchanges_with(self, reader: TableReader) -> bool:
        if (reader.fingerprint, reader.status) == (self._fingerprint, "ok") and (
            reader.block_size == self._block_size
            and reader.hash_name == self._hash_name
            and reader.transport == self._transport
        ):
            return True
        if (reader.name, reader.epoch) not in self._refused:
            self._refused.add((reader.name, reader.epoch))
            self.table.count("peers_incompatible")
            why = fingerprint_difference(self._fields, reader.fingerprint_fields) or (f"status: {reader.status}",)
            _logger.warning("no exchange with %s: %s", reader.name, "; ".join(why))
        return False

    def _reallocated(self, blocks: list[int], step: int) -> None:
        if blocks:
            for block in blocks:
                self._allocated[block] = step
            self.table.count("evictions", self.table.invalidate(blocks))

    def _publish(self, sequence: Sequence, full_blocks: int, step: int) -> None:
        first, last = sequence.published, min(full_blocks, len(sequence.block_ids))
        if last <= first or not self._exchanges:
            return
        keys = sequence.keys(last)
        last = min(last, len(keys))
        blocks = sequence.block_ids[first:last]
        keys = keys[first:last]
        if any(self._allocated[block] > step for block in blocks):  # given away while the step was under way
            kept = [place for place, block in enumerate(blocks) if self._allocated[block] <= step]
            blocks, keys = [blocks[place] for place in kept], keys[kept]
        self.table.publish(blocks, keys)
        sequence.published = last

    def _settle(self, request_id: str, part: ImportReport, ranks: int) -> None:
        entry = self._imports.get(request_id)
        if entry is None:
            return
        sequence, plan = entry
        earlier = self._partial.pop(request_id, None)
        report = part.merged(earlier) if earlier else part
        plan.ranks_done += ranks
        if plan.ranks_done < self._ranks:
            self._partial[request_id] = report
            return
        del self._imports[request_id]
        targets = plan.target_blocks.tolist()
        good = next((place for place, block in enumerate(targets) if block in report.failed_blocks), len(targets))
        # the blocks are offered onward with the request's first step, behind which nobody waits
        sequence.local_blocks, sequence.imported_blocks = plan.local_blocks, good
        self.table.count("imports")
        self.table.count("import_blocks", good)
        self.table.count("import_bytes", report.bytes)
        self.table.count("import_nanoseconds", report.nanoseconds)
        if report.failed_blocks and not report.bytes:  # nothing was copied at all
            owner = (plan.source, plan.epoch)
            self._unreadable[owner] = self._unreadable.get(owner, 0) + 1
        if good < len(targets):
            self.table.count("check_failures", report.stale_blocks)
            self.table.count("fallbacks")
            _logger.info("import of %s from %s fell short: %s", request_id, plan.source, report.reason)

    def _count(self, sequence: Sequence, computed_tokens: int) -> None:
        """Count a prompt once: which of its tokens were here, came from a peer, or are computed now."""
        if sequence.counted:
            return
        sequence.counted = True
        size = self._block_size
        prompt = sequence.request.num_prompt_tokens
        reused = min(computed_tokens, prompt)
        peer = max(0, min(reused - sequence.local_blocks * size, sequence.imported_blocks * size))
        self.table.count("requests")
        self.table.count("prompt_tokens", prompt)
        self.table.count("peer_tokens_" + self._transport, peer)
        self.table.count("local_tokens", reused - peer)
        self.table.count("computed_tokens", prompt - reused)

    def _notice_reset(self) -> None:
        if self._pool is not None and self._pool.cached_block_hash_to_block is not self._pool_map:
            self.reset()


def _hinted_source(params: Any) -> str | None:
    """Return the one replica that the gateway wants us to import from, "" for none, None if it leaves that to us."""
    hint = params.get(HINT) if isinstance(params, dict) else None
    source = hint.get("source") if isinstance(hint, dict) else None
    return source if isinstance(source, str) else None
