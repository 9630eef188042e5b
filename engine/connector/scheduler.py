"""The connector's scheduler half: what to import, what to offer, and when a block's offer must end.

It owns the replica's block table. Plain code over plain values: vLLM's objects are only read, its block pool aside (`pins.py`),
and `engine.connector.peerkv_connector` keeps any exception from reaching vLLM.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from engine.connector.accounts import Account, Accounts, PromptWork
from engine.connector.imports import Imports
from engine.connector.messages import StepMetadata, WorkerReport
from engine.connector.offers import NEVER, Offers
from engine.connector.peers import Peers
from engine.connector.pins import BlockPool, Pins
from engine.connector.request_keys import RootKeys, extra_content
from engine.connector.sequence import Sequence
from transport.backends.base import ImportJob
from transport.hint import PinWish
from transport.keys import KeyChain
from transport.table.deliveries import DeliveryReason
from transport.table.directory import TableDirectory
from transport.table.writer import TableWriter

Work = list[tuple[Sequence, int]]
"""What a step will have computed: sequences, and how many tokens of each are computed then."""


class SchedulerHalf:
    """Keeps `table` true and plans imports from `peers`.

    `block_size` is in tokens, `ranks` the number of workers that must report an import before it is done, `pin_share_max` the
    share of all blocks that pins may hold.
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
        pin_share_max: float = 0.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.table = table
        self._sources = Peers(
            peers,
            fingerprint,
            fields,
            block_size=block_size,
            hash_name=hash_name,
            transport=transport,
            refused=lambda: table.count("peers_incompatible"),
        )
        self._roots = RootKeys(fingerprint, hash_name)
        self._block_size = block_size
        self._hash_name = hash_name
        self._exchanges = status == "ok"
        self._clock_ns = clock_ns
        self._pool: BlockPool | None = None
        self._pool_map: Any = None
        self._offers = Offers(table)
        self._accounts = Accounts(table, transport)
        self._pins = Pins(int(pin_share_max * table.layout.blocks))
        self._imports = Imports(table, self._accounts, self._sources, block_size=block_size, transport=transport, ranks=ranks)
        self._sequences: dict[str, Sequence] = {}
        self._steps: deque[tuple[int, Work, PromptWork]] = deque()
        self._step = 0
        self._told: tuple[int, ...] = ()

    # What vLLM asks while it schedules

    def bind_pool(self, pool: BlockPool) -> None:
        """Remember the pool: to notice a reset of the prefix cache, and to pin."""
        self._pool = pool
        self._pool_map = pool.cached_block_hash_to_block
        self._pins.bind_pool(pool)

    def arrived(self, request: Any) -> None:
        """Take note of a request that vLLM was given."""
        self._account(request, self._clock_ns())
        self._tell()

    def match(self, request: Any, computed_tokens: int) -> int:
        """Return how many tokens beyond `computed_tokens` a peer can supply; plan the import but change nothing else."""
        self._notice_reset()  # here already: later it would take the import that is being planned for one of before
        now_ns = self._clock_ns()
        account = self._account(request, now_ns)
        sequence = self._sequence(request, account)
        tokens = 0
        if sequence is None and account.hint.pin is not None and not account.asked_ns:
            self.table.count("pins_refused")
        if sequence is None or not sequence.tried:
            tokens, account.why = self._plan(sequence, request, computed_tokens // self._block_size)
            account.planned_tokens = tokens
            account.source = sequence.planned.source if sequence is not None and sequence.planned is not None else ""
        self._accounts.looked_up(request.request_id, account, computed_tokens + tokens, now_ns)
        return tokens

    def allocated(self, request: Any, block_ids: list[int], external_tokens: int) -> bool:
        """Begin the import of a request that vLLM gave blocks to; False if there is nothing to begin."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return False
        plan = sequence.planned
        sequence.planned = None
        sequence.tried = True
        count = external_tokens // self._block_size
        if plan is None or len(plan) < count or plan.local_blocks + count > len(block_ids):
            sequence.account.why = DeliveryReason.ALLOCATION
            self.give_up(request.request_id, block_ids, external_tokens)
            return True
        targets = block_ids[plan.local_blocks : plan.local_blocks + count]
        self._offers.end(targets, self._step + 1)
        self._imports.begin(sequence, plan, targets, self._clock_ns())
        return True

    def give_up(self, request_id: str, block_ids: list[int], external_tokens: int) -> None:
        """Have an import that vLLM allocated for reported as failed."""
        self._imports.give_up(request_id, block_ids[-(external_tokens // self._block_size) :])

    def step(self, output: Any) -> StepMetadata:
        """Close a scheduling step: end the offers of blocks that it gave away, note what it will have computed."""
        self._step += 1
        self._notice_reset()
        now_ns = self._clock_ns()
        work: Work = []
        scheduled = output.num_scheduled_tokens
        for request_id in output.preempted_req_ids or ():
            self._accounts.preempted(request_id)
        for new in output.scheduled_new_reqs:  # with model runner V2, resumed ones too
            tokens, blocks = scheduled.get(new.req_id, 0), list(new.block_ids[0])
            self._offers.end(blocks[new.num_computed_tokens // self._block_size :], self._step)
            self._accounts.scheduled(new.req_id, new.num_computed_tokens, tokens, now_ns)
            sequence = self._sequences.get(new.req_id)
            if sequence is not None:
                sequence.block_ids, sequence.published = blocks, 0
                work.append((sequence, new.num_computed_tokens + tokens))
        self._step_cached(output.scheduled_cached_reqs, scheduled, work, now_ns)
        self._steps.append((self._step, work, self._accounts.close_step()))
        self._pins.expire(now_ns)
        asked, running = self._accounts.asked, self._accounts.running
        self._pins.make_room(dry=not scheduled and not running and any(each not in self._imports for each in asked))
        self.table.beat(now_ns)
        self._tell()
        return StepMetadata(self._step, self.take_starting(), bool(scheduled))

    def take_starting(self) -> tuple[ImportJob, ...]:
        """Return the imports to begin in this step, each once."""
        return self._imports.take_starting()

    def _step_cached(self, cached: Any, scheduled: dict[str, int], work: Work, now_ns: int) -> None:
        """Note the requests that run on. Nothing is done for one that decodes and neither got nor filled a block."""
        size, sequences, resumed = self._block_size, self._sequences, cached.resumed_req_ids
        for request_id, computed, added in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            sequence = sequences.get(request_id)
            if added and added[0]:
                blocks = list(added[0])
                again = request_id in resumed
                self._offers.end(blocks[computed // size :] if again else blocks, self._step)
                if sequence is not None and again:
                    sequence.block_ids, sequence.published = blocks, 0
                elif sequence is not None:
                    sequence.block_ids += blocks
            if sequence is not None:
                end = computed + scheduled.get(request_id, 0)
                if end // size > sequence.published:
                    work.append((sequence, end))
        if resumed or self._accounts.prefilling:
            self._step_prompts(cached, scheduled, work, now_ns)

    def _step_prompts(self, cached: Any, scheduled: dict[str, int], work: Work, now_ns: int) -> None:
        """Account for the requests that run on with a part of their prompt."""
        with_prompts = cached.resumed_req_ids.union(self._accounts.prefilling)
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in with_prompts:
                tokens, sequence = scheduled.get(request_id, 0), self._sequences.get(request_id)
                self._accounts.scheduled(request_id, computed, tokens, now_ns)
                if sequence is not None and sequence.pin is not None:  # its last part may fill no block
                    work.append((sequence, computed + tokens))

    # What vLLM tells when a step is over

    def report(self, report: WorkerReport) -> None:
        """Offer the blocks that became full up to the reported step, and settle the imports that ended."""
        now_ns = self._clock_ns()
        while self._steps and self._steps[0][0] <= report.step:
            step, work, prompts = self._steps.popleft()
            for sequence, end in work:
                # the KV of the newest token is not computed yet; rejected drafts never reach all_token_ids
                computed = min(end, len(sequence.request.all_token_ids) - 1)
                if self._exchanges:
                    self._offers.publish(sequence, computed // self._block_size, step)
                if sequence.pin is not None and end >= sequence.account.prompt_tokens:
                    self._pin(sequence, sequence.pin, step, now_ns)
            self._accounts.computed(prompts, now_ns)
        self._imports.settle(report, now_ns)
        self._tell()

    def finished(self, request_id: str, *, aborted: bool = False) -> None:
        """Forget a request; what its last step computed is still offered when that step is reported."""
        self._sequences.pop(request_id, None)
        self._accounts.finished(request_id, aborted=aborted)
        self._tell()

    def reset(self) -> None:
        """Withdraw everything: the prefix cache was reset, and what runs on was computed before that."""
        self.unpin()
        if self._pool is not None:
            self._pool_map = self._pool.cached_block_hash_to_block
        self._offers.end_all()
        self._steps = deque((step, [], prompts) for step, _, prompts in self._steps)
        self._imports.forget()
        for sequence in self._sequences.values():
            sequence.published = NEVER

    def unpin(self) -> None:
        """Give up all pins."""
        self._pins.clear()
        self._tell()

    def withdraw(self) -> None:
        """Offer, import and pin nothing any more: a fault left the table in doubt."""
        self._exchanges = False
        self.table.count("table_errors")
        self.reset()

    def close(self) -> None:
        """Unpin, end the table's epoch and close the peers' tables."""
        try:
            self._pins.clear()
        finally:
            self.table.close()
            self._sources.close()

    # Inside

    def _account(self, request: Any, now_ns: int) -> Account:
        account, opened = self._accounts.arrived(request, now_ns)
        if opened:
            self._pins.expire(now_ns)
            self._pins.drop(account.hint.unpin)
        return account

    def _sequence(self, request: Any, account: Account) -> Sequence | None:
        known = self._sequences.get(request.request_id)
        if known is not None:
            return known
        root = self._roots.of(request)
        if root is None:
            return None
        chain = KeyChain(root, self._block_size, self._hash_name)
        extras = extra_content(request, self._block_size)
        sequence = self._sequences[request.request_id] = Sequence(request, account, chain, extras, account.hint.pin)
        return sequence

    def _plan(self, sequence: Sequence | None, request: Any, local: int) -> tuple[int, DeliveryReason]:
        """Plan an import behind `local` blocks; return how many tokens it brings, and why it brings no more."""
        if sequence is None or request.skip_reading_prefix_cache:
            return 0, DeliveryReason.READS_NO_CACHE
        size, hint = self._block_size, sequence.account.hint
        sequence.planned = None
        full = (request.num_tokens - 1) // size
        wanted = full if hint.tokens is None else min(full, hint.tokens // size)
        if local >= full or not self._exchanges:
            return 0, DeliveryReason.NONE if local >= full else DeliveryReason.NOT_EXCHANGING
        if local >= wanted or hint.source == "":
            return 0, DeliveryReason.LIMITED if local >= wanted else DeliveryReason.NO_SOURCE_GIVEN
        keys = sequence.keys(wanted)[local:]
        plan, why = self._sources.longest(hint.source, keys, local)
        sequence.planned = plan
        if plan is not None and len(plan) == len(keys) and wanted < full:
            why = DeliveryReason.LIMITED
        return (len(plan) if plan is not None else 0) * size, why

    def _pin(self, sequence: Sequence, wish: PinWish, step: int, now_ns: int) -> None:
        """Pin the full blocks of a prompt that is computed, if nobody else was given one of them since."""
        sequence.pin = None
        blocks = sequence.block_ids[: sequence.account.prompt_tokens // self._block_size]
        whole = self._exchanges and self._offers.unchanged(blocks, step)
        self.table.count("pins" if whole and self._pins.take(wish, blocks, now_ns) else "pins_refused")

    def _notice_reset(self) -> None:
        if self._pool is not None and self._pool.cached_block_hash_to_block is not self._pool_map:
            self.reset()

    def _tell(self) -> None:
        load = (*self._accounts.load(), len(self._imports), self._pins.blocks)
        if load != self._told:
            self._told = load
            self.table.tell_load(load)
