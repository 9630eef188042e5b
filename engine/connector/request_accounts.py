"""The account of each request, from its arrival to its first token: what is waiting, and what was delivered.

Plain code over plain values: times are CLOCK_MONOTONIC nanoseconds and come in as arguments.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.connector.step_messages import ImportReport
from transport.hint import Hint, read_hint
from transport.node.source_way import import_way
from transport.table.deliveries import Delivery, DeliveryReason, FromSource
from transport.table.tiers import tier_kind
from transport.table.writer import TableWriter


class Phase(enum.Enum):
    """How far a request has come. A preempted one waits again."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    DECODING = enum.auto()


@dataclass(slots=True, eq=False)
class RequestAccount:
    """One request. `left`: tokens of its prompt that no step has been given yet and that are not known to be cached.

    `whole`: some step was given the end of its prompt; the report of that step brings its record. `closed`: vLLM forgot it.
    `brought` are the sources of its import and how many good tokens came from each, behind the first `import_from`.
    """

    hint: Hint
    prompt_tokens: int
    arrived_ns: int
    left: int
    phase: Phase = Phase.WAITING
    asked_ns: int = 0
    scheduled_ns: int = 0
    local_tokens: int = 0
    peer_tokens: int = 0
    planned_tokens: int = 0
    source: str = ""
    why: DeliveryReason = DeliveryReason.NONE
    import_from: int = 0
    brought: tuple[tuple[str, int], ...] = ()
    further: tuple[FromSource, ...] = ()
    import_begun_ns: int = 0
    import_wait_ns: int = 0
    import_ns: int = 0
    import_bytes: int = 0
    stale_blocks: int = 0
    failed_blocks: int = 0
    whole: bool = False
    aborted: bool = False
    closed: bool = False
    delivered: bool = False

    def delivery(self, first_token_ns: int) -> Delivery:
        """Return what happened to it."""
        scheduled = self.scheduled_ns > 0
        return Delivery(
            tag=self.hint.tag,
            arrived_ns=self.arrived_ns,
            asked_ns=self.asked_ns,
            scheduled_ns=self.scheduled_ns,
            first_token_ns=first_token_ns,
            prompt_tokens=self.prompt_tokens,
            local_tokens=self.local_tokens,
            peer_tokens=self.peer_tokens,
            computed_tokens=self.prompt_tokens - self.local_tokens - self.peer_tokens if scheduled else 0,
            import_ns=self.import_ns,
            import_wait_ns=self.import_wait_ns,
            import_bytes=self.import_bytes,
            planned_tokens=self.planned_tokens,
            stale_blocks=self.stale_blocks,
            failed_blocks=self.failed_blocks,
            source=self.source,
            why=self.why,
            further=self.further,
        )


@dataclass(slots=True)
class PromptWork:
    """What a step computes of prompts: how many tokens, and which prompts it completes, by request id."""

    tokens: int = 0
    whole: list[tuple[str, RequestAccount]] = field(default_factory=list)


class RequestAccounts:
    """All requests that the engine knows. Counts in `table`; `transport` is how its peers are read."""

    def __init__(self, table: TableWriter, transport: str) -> None:
        self._table = table
        self._transport = transport
        self._open: dict[str, RequestAccount] = {}
        self._phases = dict.fromkeys(Phase, 0)
        self._left = 0
        self._under_way = 0
        self._work = PromptWork()
        self.prefilling: dict[str, RequestAccount] = {}
        """Requests whose prompts have been given to steps in part, but not to the end."""
        self.asked: dict[str, RequestAccount] = {}
        """Requests that vLLM would run if it had room: it asked for their prefix but gave them no step since."""

    def load(self) -> tuple[int, int, int, int]:
        """Return the first four fields of an EngineLoad."""
        waiting, prefilling, decoding = self._phases.values()
        return waiting, prefilling + decoding, self._left + self._under_way, decoding

    @property
    def running(self) -> int:
        """Requests that have blocks and are given steps."""
        return self._phases[Phase.PREFILLING] + self._phases[Phase.DECODING]

    def arrived(self, request: Any, now_ns: int) -> tuple[RequestAccount, bool]:
        """Return a request's account, and whether it was opened just now."""
        known = self._open.get(request.request_id)
        if known is not None:
            return known, False
        hint, tokens = read_hint(request.kv_transfer_params), int(request.num_prompt_tokens)
        account = self._open[request.request_id] = RequestAccount(hint, tokens, now_ns, tokens)
        self._phases[Phase.WAITING] += 1
        self._left += tokens
        self._table.waiting.add(hint.tag)
        if hint.malformed:
            self._table.count("hints_malformed", hint.malformed)
        return account, True

    def looked_up(self, request_id: str, account: RequestAccount, cached_tokens: int, now_ns: int) -> None:
        """vLLM asked for a prefix: `cached_tokens` of the prompt are here or about to come."""
        account.asked_ns = account.asked_ns or now_ns
        self.asked[request_id] = account
        self._leave(account, account.prompt_tokens - cached_tokens)

    def import_begun(self, account: RequestAccount, source: str, now_ns: int) -> None:
        """Blocks were allocated for an import from `source`."""
        self._table.waiting.begin(account.hint.tag)
        account.import_begun_ns, account.source = now_ns, source

    def import_ended(
        self, account: RequestAccount, begin: int, brought: Sequence[tuple[str, int]], report: ImportReport, now_ns: int
    ) -> None:
        """After the first `begin` tokens so many good ones came from each source."""
        told = report.by_source()
        account.import_from, account.brought = begin, tuple(brought)
        account.import_wait_ns = now_ns - account.import_begun_ns
        account.import_ns, account.import_bytes = sum(each.nanoseconds for each in told), sum(each.bytes for each in told)
        account.stale_blocks = sum(each.stale_blocks for each in told)
        account.failed_blocks = sum(len(each.failed_blocks) for each in told)
        if account.failed_blocks:
            account.why = DeliveryReason.CHECK_FAILED if account.stale_blocks else DeliveryReason.COPY_FAILED
            if not account.closed:  # otherwise nobody would ever remove it from the waiting ones
                self._leave(account, account.prompt_tokens - begin - sum(tokens for _, tokens in brought))

    def scheduled(self, request_id: str, computed_tokens: int, tokens: int, now_ns: int) -> None:
        """A step computes `tokens` more of a request after the first `computed_tokens`."""
        account = self._open.get(request_id)
        if account is None:
            return
        self.asked.pop(request_id, None)
        if not account.scheduled_ns:
            account.scheduled_ns = now_ns
            self._table.waiting.begin(account.hint.tag)
            if account.import_wait_ns:  # the steps between its end and this one are what the import takes as well
                account.import_wait_ns = now_ns - account.import_begun_ns
            self._count(account, computed_tokens)
        end, prompt = computed_tokens + tokens, account.prompt_tokens
        self._work.tokens += max(0, min(end, prompt) - computed_tokens)
        self._leave(account, prompt - end)
        if end < prompt:
            self._enter(account, Phase.PREFILLING)
            self.prefilling[request_id] = account
            return
        self.prefilling.pop(request_id, None)
        if not account.whole:
            account.whole = True
            self._work.whole.append((request_id, account))
        self._enter(account, Phase.DECODING)

    def preempted(self, request_id: str) -> None:
        """vLLM took a request's blocks; it waits again, and none of its prompt is known to be cached."""
        account = self._open.get(request_id)
        if account is not None:
            self.prefilling.pop(request_id, None)
            self._enter(account, Phase.WAITING)
            self._leave(account, account.prompt_tokens)

    def close_step(self) -> PromptWork:
        """Return what the step computes of prompts, to be handed to `computed` when it is done."""
        work, self._work = self._work, PromptWork()
        self._under_way += work.tokens
        return work

    def computed(self, work: PromptWork, now_ns: int) -> None:
        """A step is done: write the records of the requests whose first token it made."""
        self._under_way -= work.tokens
        for _, account in work.whole:
            self._deliver(account, 0 if account.aborted else now_ns)

    def finished(self, request_id: str, *, aborted: bool) -> None:
        """Forget a request. The record of one whose step is still under way is written when that is reported."""
        account = self._open.pop(request_id, None)
        if account is None:
            return
        self.prefilling.pop(request_id, None)
        self.asked.pop(request_id, None)
        self._phases[account.phase] -= 1
        self._leave(account, 0)
        self._table.waiting.remove(account.hint.tag)
        account.aborted, account.closed = aborted, True
        if not account.whole:
            self._deliver(account, 0)

    def _deliver(self, account: RequestAccount, first_token_ns: int) -> None:
        if not account.delivered:
            account.delivered = True
            self._table.deliver(account.delivery(first_token_ns), import_way(self._transport, account.source))

    def _count(self, account: RequestAccount, computed_tokens: int) -> None:
        """Count a prompt once: which of its tokens were here, came from a peer, or are computed now."""
        if account.planned_tokens and not account.import_begun_ns:
            account.why = DeliveryReason.ALLOCATION
        prompt = account.prompt_tokens
        reused = min(computed_tokens, prompt)
        imported = max(0, reused - account.import_from)
        used = []
        for source, tokens in account.brought:
            if some := min(imported - account.peer_tokens, tokens):
                account.peer_tokens += some
                used.append(FromSource(source, some))
                kind = tier_kind(source)
                self._table.count(f"tier_tokens_{kind}" if kind is not None else "peer_tokens_" + self._transport, some)
        account.further = tuple(used[1:])
        account.local_tokens = reused - account.peer_tokens
        self._table.count("requests")
        self._table.count("prompt_tokens", prompt)
        self._table.count("local_tokens", account.local_tokens)
        self._table.count("computed_tokens", prompt - reused)

    def _enter(self, account: RequestAccount, phase: Phase) -> None:
        self._phases[account.phase] -= 1
        self._phases[phase] += 1
        account.phase = phase

    def _leave(self, account: RequestAccount, left: int) -> None:
        left = max(0, left)
        self._left += left - account.left
        account.left = left
