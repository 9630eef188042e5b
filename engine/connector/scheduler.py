"""The connector's scheduler half: what to import, what to offer, and when a block's offer must end.

It owns the replica's block table. Plain code over plain values: vLLM's objects are only read, its block pool aside (`pins.py`),
and `engine.connector.peerkv_connector` keeps any exception from reaching vLLM.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Blocks
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from engine.connector.ahead import Pace
from engine.connector.import_sources import Peers
from engine.connector.imports import Imports
from engine.connector.offers import NEVER, Offers
from engine.connector.other_loads import OtherLoads
from engine.connector.pins import BlockPool, Pins
from engine.connector.request_accounts import PromptWork, RequestAccount, RequestAccounts
from engine.connector.request_keys import RootKeys, extra_content
from engine.connector.sequence import NULL_BLOCK, Sequence, fitted
from engine.connector.step_messages import StepMetadata, WorkerReport
from engine.connector.stored import Stored
from engine.connector.vllm_groups import ModelGroups
from engine.tiers.stores import NO_STORES
from transport.backends.base import ImportJob
from transport.groups import needed
from transport.hint import PinWish
from transport.keys import KeyChain
from transport.table.deliveries import DeliveryReason
from transport.table.directory import TableDirectory
from transport.table.kept_table import KeptTable
from transport.table.quality import LOSSY, is_lossy_salt, marked, tenant_mark
from transport.table.writer import TableWriter

GroupBlocks = Blocks[Blocks[int]]
"""Block ids, a list for each KV cache group, in vLLM's order."""
CacheBlocks = Callable[[Any, int], None]
"""vLLM's `KVCacheManager.cache_blocks`: enters the blocks of a request's first tokens, those that it has not entered yet."""
_IMPORTING = "WAITING_FOR_REMOTE_KVS"
"""vLLM's status of a request that has blocks and waits for what fills them."""


@dataclass(slots=True)
class Work:
    """What a step will have computed: sequences with how many tokens of each are computed then, and the states it leaves.

    A state is a sequence's, of a KV cache group, in a block, behind so many tokens.
    """

    ends: list[tuple[Sequence, int]] = field(default_factory=list)
    states: list[tuple[Sequence, int, int, int]] = field(default_factory=list)


class SchedulerHalf:
    """Keeps `table` true and plans imports from `peers`.

    `groups` are the model's, `ranks` the number of workers that must report an import before it is done, `pin_share_max` the
    share of all blocks that pins may hold, `tier` the table of this replica's host memory, if it has any, of which each tenant
    has the share `tenant_share_max` at most while others want room, and a block stays `host_memory_ttl_seconds` (0: no end).
    """

    def __init__(
        self,
        table: TableWriter,
        peers: TableDirectory,
        fingerprint: bytes,
        fields: dict[str, str],
        *,
        groups: ModelGroups,
        hash_name: str,
        transport: str,
        status: str,
        ranks: int = 1,
        pin_share_max: float = 0.0,
        tier: KeptTable | None = None,
        tenant_share_max: float = 1.0,
        host_memory_ttl_seconds: float = 0.0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.table = table
        self._sources = Peers(
            peers,
            fingerprint,
            fields,
            groups=groups,
            hash_name=hash_name,
            transport=transport,
            refused=lambda: table.count("peers_incompatible"),
            own_tier=tier.path.stem if tier is not None else "",
        )
        bounds = {"tenant_share_max": tenant_share_max, "pin_share_max": pin_share_max, "ttl_seconds": host_memory_ttl_seconds}
        self._stored = Stored(table, tier, self._sources, ranks=ranks, **bounds) if tier is not None else None
        self._roots = RootKeys(fingerprint, hash_name)
        self._groups = groups
        self._hash_name = hash_name
        self._exchanges = status == "ok"
        self._clock_ns = clock_ns
        self._pool: BlockPool | None = None
        self._pool_map: Any = None
        self._cache_blocks: CacheBlocks | None = None
        if self._stored is None:
            self._offers = Offers(table, groups)
        else:
            self._offers = self._stored.offers = Offers(table, groups, self._stored.leaving, self._stored.asked)
        self._accounts = RequestAccounts(table, transport)
        self._pins = Pins(int(pin_share_max * table.layout.blocks))
        self._imports = Imports(table, self._accounts, self._sources, groups=groups, transport=transport, ranks=ranks)
        self._others = OtherLoads(groups)
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

    def bind_cache(self, cache_blocks: CacheBlocks) -> None:
        """Remember how vLLM enters the blocks of a request in its prefix cache."""
        self._cache_blocks = cache_blocks

    def arrived(self, request: Any) -> None:
        """Take note of a request that vLLM was given."""
        self._account(request, self._clock_ns())
        self._tell()

    def match(self, request: Any, computed_tokens: int) -> int:
        """Return how many tokens beyond `computed_tokens` a peer can supply; plan the import but change nothing else."""
        self._others.found(request.request_id, computed_tokens)
        self._notice_reset()  # here already: later it would take the import that is being planned for one of before
        now_ns = self._clock_ns()
        account = self._account(request, now_ns)
        sequence = self._sequence(request, account)
        tokens = 0
        if sequence is None and account.hint.pin is not None and not account.asked_ns:
            self.table.count("pins_refused")
        if sequence is None or not sequence.tried:
            tokens, account.why = self._plan(sequence, request, computed_tokens // self._groups.step * self._groups.step)
            account.planned_tokens = tokens
            account.source = sequence.planned[0].source if sequence is not None and sequence.planned else ""
        self._accounts.looked_up(request.request_id, account, computed_tokens + tokens, now_ns)
        return tokens

    def allocated(self, request: Any, block_ids: GroupBlocks, external_tokens: int) -> bool:
        """Begin the import of a request that vLLM gave blocks to; False if there is nothing to begin."""
        self._others.ours(request.request_id)
        sequence = self._sequences.get(request.request_id)
        if sequence is None:
            return False
        plan, sequence.planned = sequence.planned, ()
        sequence.tried = True
        parts, targets = fitted(plan, self._groups.groups, self._groups.ordered(block_ids), external_tokens)
        if not parts:
            sequence.account.why = DeliveryReason.ALLOCATION
            self.give_up(request.request_id, block_ids, external_tokens)
            return True
        for part, blocks in zip(parts, targets, strict=True):
            if self._stored is not None and part.source == self._stored.name:
                self._stored.restored(part.source_blocks[: len(blocks)].tolist())
        self._offers.end([block for blocks in targets for block in blocks], self._step + 1, by_import=True)
        for part, blocks in zip(parts, targets, strict=True):
            self._offers.imported(blocks, part.states)
        self._imports.begin(sequence, parts, targets, self._clock_ns())
        return True

    def admitted(self, request_id: str, blocks: Any) -> None:
        """vLLM gave a request `blocks`, its `KVCacheBlocks`, and we load nothing into them; another connector may."""
        self._others.admitted(request_id, blocks)

    def give_up(self, request_id: str, block_ids: GroupBlocks, external_tokens: int) -> None:
        """Have an import that vLLM allocated for reported as failed."""
        self._imports.give_up(request_id, self._groups.ordered(block_ids), external_tokens)

    def step(self, output: Any) -> StepMetadata:
        """Close a scheduling step: end the offers of blocks that it gave away, note what it will have computed."""
        self._step += 1
        self._notice_reset()
        now_ns = self._clock_ns()
        work = Work()
        scheduled = output.num_scheduled_tokens
        for request_id in output.preempted_req_ids or ():
            self._accounts.preempted(request_id)
        for new in output.scheduled_new_reqs:  # with model runner V2, resumed ones too
            tokens, sequence = scheduled.get(new.req_id, 0), self._sequences.get(new.req_id)
            self._given(new.req_id, sequence, new.block_ids, new.num_computed_tokens, again=True)
            self._accounts.scheduled(new.req_id, new.num_computed_tokens, tokens, now_ns)
            if sequence is not None:
                work.ends.append((sequence, new.num_computed_tokens + tokens))
        self._step_cached(output.scheduled_cached_reqs, scheduled, work, now_ns)
        for blocks in self._others.begun(scheduled) if self._others.given else ():
            self._written_by_others(blocks)
        if not self._groups.plain:
            self._step_groups(output, work)
        prompts = self._accounts.close_step()
        self._steps.append((self._step, work, prompts))
        self._unpin((), now_ns)
        idle, loading = not scheduled and not self._accounts.running, self._others.under_way
        self._pins.make_room(
            dry=idle and any(each not in self._imports and each not in loading for each in self._accounts.asked)
        )
        self.table.beat(now_ns)
        self._tell()
        pace = self._pace(bool(scheduled), prompts)
        stores = self._stored.close_step(self._pool, output, pace) if self._stored is not None else NO_STORES
        return StepMetadata(self._step, self.take_starting(), bool(scheduled), stores)

    def take_starting(self) -> tuple[ImportJob, ...]:
        """Return the imports to begin in this step, each once."""
        return self._imports.take_starting()

    def _pace(self, scheduled: bool, prompts: PromptWork) -> Pace:
        if prompts.tokens or self._accounts.prefilling or len(self._imports) or self._others.under_way:
            return Pace.BUSY
        waiting, running, _, _ = self._accounts.load()
        return Pace.CALM if scheduled or waiting or running else Pace.IDLE

    def _given(self, request_id: str, sequence: Sequence | None, block_ids: GroupBlocks, computed: int, *, again: bool) -> None:
        """vLLM gave a request blocks: behind those it has, or, `again`, all it has, the first with `computed` tokens."""
        ordered = self._groups.ordered(block_ids)
        if again:
            self._written_by_others(self._others.loaded(request_id, ordered, computed))
        for group, blocks in zip(self._groups.groups, ordered, strict=True):
            self._offers.end(blocks[computed // group.block_size :] if again else blocks, self._step)
        if sequence is None:
            return
        if again:
            sequence.block_ids, sequence.published = [list(blocks) for blocks in ordered], 0
        else:
            for own, blocks in zip(sequence.block_ids, ordered, strict=True):
                own += blocks

    def _written_by_others(self, blocks: list[int]) -> None:
        """Another connector loads into `blocks` with the step that is being made, in no order with the engine's own work."""
        if blocks:
            self._offers.end(blocks, self._step)
            if self._stored is not None:
                self._stored.lost(blocks)

    def _step_cached(self, cached: Any, scheduled: dict[str, int], work: Work, now_ns: int) -> None:
        """Note the requests that run on. Nothing is done for one that decodes and neither got nor filled a block."""
        size, sequences, resumed = self._groups.unit, self._sequences, cached.resumed_req_ids
        for request_id, computed, added in zip(cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True):
            sequence = sequences.get(request_id)
            if added and any(added):
                self._given(request_id, sequence, added, computed, again=request_id in resumed)
            if sequence is not None:
                end = computed + scheduled.get(request_id, 0)
                if end // size > sequence.published:
                    work.ends.append((sequence, end))
        if resumed or self._accounts.prefilling:
            self._step_prompts(cached, scheduled, work, now_ns)

    def _step_groups(self, output: Any, work: Work) -> None:
        """Note what a step does to blocks of several groups beside giving them away: it copies some, and keeps states."""
        copies = output.kv_cache_block_copies
        self._offers.end([copy.dst_block_id for copy in copies] if copies else [], self._step)
        kept = output.kv_connector_block_state
        for request_id, states in kept.boundary_state_offloads.items() if kept is not None else ():
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                work.states += [
                    (sequence, self._groups.places.index(place), block, tokens)
                    for place, block, tokens in states
                    if self._still_owns(kept, request_id, place, block)
                ]

    def _still_owns(self, kept: Any, request_id: str, place: int, block: int) -> bool:
        """Tell whether a state's block is still its request's, or at least nobody else's.

        vLLM 0.33 notes a state when its step is over and tells of it in the next, in which it may already have given the block
        to another request: speculation had gone past it.
        """
        if self._offers.unchanged([block], self._step - 1):
            return True
        own = kept.get_block_ids(request_id)
        return own is not None and block in own[place]

    def _step_prompts(self, cached: Any, scheduled: dict[str, int], work: Work, now_ns: int) -> None:
        """RequestAccount for the requests that run on with a part of their prompt."""
        with_prompts = cached.resumed_req_ids.union(self._accounts.prefilling)
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in with_prompts:
                tokens, sequence = scheduled.get(request_id, 0), self._sequences.get(request_id)
                self._accounts.scheduled(request_id, computed, tokens, now_ns)
                if sequence is not None and sequence.pin is not None:  # its last part may fill no block
                    work.ends.append((sequence, computed + tokens))

    # What vLLM tells when a step is over

    def report(self, report: WorkerReport) -> None:
        """Offer the blocks that became full up to the reported step, and settle the imports that ended."""
        now_ns = self._clock_ns()
        if report.unmapped and self._exchanges:
            self.withdraw()
        while self._steps and self._steps[0][0] <= report.step:
            step, work, prompts = self._steps.popleft()
            for sequence, group, block, tokens in work.states if self._exchanges else ():
                self._offers.publish_state(sequence, group, block, tokens, step)
            for sequence, end in work.ends:
                # the KV of the newest token is not computed yet; rejected drafts never reach all_token_ids
                computed = min(end, len(sequence.request.all_token_ids) - 1)
                if self._exchanges:
                    self._offers.publish(sequence, computed // self._groups.unit, step, self._kept)
                if sequence.pin is not None and end >= sequence.account.prompt_tokens:
                    self._pin(sequence, sequence.pin, step, now_ns)
            self._accounts.computed(prompts, now_ns)
        if report.checked:
            self._enter(report)
        ended = self._imports.settle(report, now_ns)
        if self._stored is not None:
            self._stored.read(ended)
            self._stored.copied(report.copied, report.lost)
        self._tell()

    def transferred(self, finished: Iterable[str], invalid: set[int], report: WorkerReport | None) -> None:
        """Loads of these requests finished, ours or others', and `invalid` blocks were not filled. Before `report` is taken."""
        if invalid and report is not None:  # of ours what failed is computed before it is offered, as it is not in any step yet
            invalid = invalid - {block for ended in report.imports.values() for block in ended.failed_blocks}
        if invalid:
            held = chain(self._sequences.values(), (sequence for _, work, _ in self._steps for sequence, _ in work.ends))
            self._offers.doubt(self._others.spoilt(invalid, (sequence.block_ids for sequence in held)))
        self._others.ended(finished)

    def _enter(self, report: WorkerReport) -> None:
        """Have vLLM enter the blocks that are good in its prefix cache while the rest of an import is on its way.

        vLLM does that when an import has ended, before the step that everybody waits for, and then has only the rest to enter.
        """
        self._notice_reset()
        for sequence, tokens in self._imports.checked(report):
            if self._cache_blocks is not None and str(sequence.request.status) == _IMPORTING:
                self._cache_blocks(sequence.request, tokens)

    def finished(self, request_id: str, *, aborted: bool = False) -> None:
        """Forget a request; what its last step computed is still offered when that step is reported."""
        self._sequences.pop(request_id, None)
        self._others.forget(request_id)
        self._accounts.finished(request_id, aborted=aborted)
        self._tell()

    def reset(self) -> None:
        """Withdraw everything: the prefix cache was reset, and what runs on was computed before that."""
        self.unpin()
        if self._pool is not None:
            self._pool_map = self._pool.cached_block_hash_to_block
        self._offers.end_all()
        if self._stored is not None:
            self._stored.clear()
        self._steps = deque((step, Work(), prompts) for step, _, prompts in self._steps)
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

    def _account(self, request: Any, now_ns: int) -> RequestAccount:
        account, opened = self._accounts.arrived(request, now_ns)
        if opened:
            self._unpin(account.hint.unpin, now_ns)
            if self._stored is not None:
                self._stored.wanted(account.hint.store)
        return account

    def _sequence(self, request: Any, account: RequestAccount) -> Sequence | None:
        known = self._sequences.get(request.request_id)
        if known is not None:
            return known
        root = self._roots.of(request)
        if root is None:
            return None
        chain = KeyChain(root, self._groups.unit, self._hash_name)
        extras = extra_content(request, self._groups.unit)
        quality = (LOSSY if is_lossy_salt(request.cache_salt) else 0) | marked(tenant_mark(request.cache_salt))
        sequence = self._sequences[request.request_id] = Sequence(request, account, chain, extras, account.hint.pin, quality)
        return sequence

    def _plan(self, sequence: Sequence | None, request: Any, local: int) -> tuple[int, DeliveryReason]:
        """Plan an import behind `local` tokens; return how many tokens it brings, and why it brings no more."""
        if sequence is None or request.skip_reading_prefix_cache:
            return 0, DeliveryReason.READS_NO_CACHE
        step, unit, hint = self._groups.step, self._groups.unit, sequence.account.hint
        sequence.planned = ()
        full = (request.num_tokens - 1) // step * step
        wanted = full if hint.tokens is None else min(full, hint.tokens // step * step)
        if local >= full or not self._exchanges:
            return 0, DeliveryReason.NONE if local >= full else DeliveryReason.NOT_EXCHANGING
        if local >= wanted or hint.source == "":
            return 0, DeliveryReason.LIMITED if local >= wanted else DeliveryReason.NO_SOURCE_GIVEN
        keys = sequence.keys(wanted // unit)
        wanted = len(keys) * unit // step * step
        plan, why = self._sources.best(hint.source, keys, local, wanted)
        sequence.planned = plan
        if plan and plan[-1].end == wanted < full:
            why = DeliveryReason.LIMITED
        return (plan[-1].end - local if plan else 0), why

    def _pin(self, sequence: Sequence, wish: PinWish, step: int, now_ns: int) -> None:
        """Pin what is needed of a prompt that is computed, if nobody else was given one of its blocks since."""
        sequence.pin = None
        blocks = self._pinnable(sequence)
        whole = self._exchanges and blocks is not None and self._offers.unchanged(blocks, step)
        pinned = whole and self._pins.take(wish, blocks or [], now_ns)
        self.table.count("pins" if pinned else "pins_refused")
        if pinned and self._stored is not None:
            self._stored.pin(wish, blocks or [], now_ns)

    def _unpin(self, ids: Blocks[int], now_ns: int) -> None:
        """End pins by number, and those whose time is up."""
        self._pins.drop(ids)
        self._pins.expire(now_ns)
        if self._stored is not None:
            self._stored.unpin(ids, now_ns)

    def _pinnable(self, sequence: Sequence) -> list[int] | None:
        """Return the blocks with which the prompt's full blocks are a prefix that can be used again; None if some are gone."""
        prompt, step = sequence.account.prompt_tokens, self._groups.step
        if self._groups.plain:
            return sequence.block_ids[0][: prompt // step]
        end, found = (prompt - 1) // step * step, []
        for number, group in enumerate(self._groups.groups):
            part = needed(group, 0, end)
            if group.kind == "state":
                tokens, block, left = sequence.states.get(number, (0, NULL_BLOCK, 0))
                blocks = [block] if tokens == end and self._offers.unchanged([block], left) else []
            else:
                blocks = sequence.block_ids[number][part.start : part.stop]
            if len(blocks) < len(part) or not all(block != NULL_BLOCK and self._kept(block) for block in blocks):
                return None
            found += blocks
        return found

    def _kept(self, block: int) -> bool:
        """Tell whether vLLM keeps a block for its own prefix cache."""
        return self._pool is None or self._pool.blocks[block].block_hash is not None

    def _notice_reset(self) -> None:
        if self._pool is not None and self._pool.cached_block_hash_to_block is not self._pool_map:
            self.reset()

    def _tell(self) -> None:
        load = (*self._accounts.load(), len(self._imports), self._pins.blocks)
        if load != self._told:
            self._told = load
            self.table.tell_load(load)
