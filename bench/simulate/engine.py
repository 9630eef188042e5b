"""A replica modelled after vLLM's V1 scheduler (v1/core/sched/scheduler.py; compared with 0.32).

Each step has a budget of tokens: running decodes take one each, half-prefilled prompts the next share, then waiting requests
in order of arrival, as long as there is memory for a whole prompt (`scheduler_reserve_full_isl`). Blocks count as cached as
soon as they are scheduled, as in vLLM, and are published when their step is done. A peer's blocks are requested when the
scheduler first reaches a request; they arrive between steps, and the request is then first in line. If there is no memory for
generated tokens, the request that was admitted last is preempted.

Steps without prompt tokens are simulated many at once, up to the next one in which something happens.
"""

import heapq
import math
from collections import deque

from bench.simulate.jobs import Job, covered_tokens, useful_tokens
from bench.simulate.prefix_cache import PrefixCache
from bench.simulate.profiles import EngineProfile
from bench.simulate.published import PublishedBlocks

CONTENDED_STEPS_MAX = 16  # steps taken at once where other replicas slow them down: those come and go


class Engine:
    """One replica. The caller owns the clock: it calls `begin`, and `complete` at the time that `begin` returned.

    Results are left in `first_tokens`, `finished` and `imports`, which the caller empties.
    """

    def __init__(self, number: int, profile: EngineProfile, trace_block_tokens: int, published: PublishedBlocks) -> None:
        self.number = number
        self.profile = profile
        self.cache = PrefixCache(profile.kv_tokens, self._evicted)
        self.first_tokens: list[Job] = []
        self.finished: list[Job] = []
        self.imports: list[Job] = []
        self.waiting: deque[Job] = deque()
        self.waiting_tokens = 0
        self.importing = 0
        self.busy_seconds = 0.0
        self.steps = 0
        self.preemptions = 0
        self.ends: float | None = None  # of the step under way
        self.version = 0  # of `ends`
        self._published = published
        self._trace_block_tokens = trace_block_tokens
        self._running: dict[int, Job] = {}
        self._prefilling: dict[int, Job] = {}
        self._filled: list[int] = []
        self._decoding = 0
        self._context_tokens = 0
        self._finishing: list[tuple[int, int]] = []  # (count of steps, tag)
        self._began = 0.0
        self._taken = 0
        self._first_step_seconds = 0.0
        self._slowdown = 1.0

    @property
    def decoding(self) -> int:
        """Requests that are generating."""
        return self._decoding

    @property
    def running(self) -> int:
        """Requests that are admitted and not finished."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Queue a request. Raises ValueError if it can never fit."""
        if job.request.prompt_tokens + job.request.output_tokens + self.profile.block_tokens > self.profile.kv_tokens:
            raise ValueError(f"a request of {job.request.prompt_tokens} tokens is larger than the KV cache")
        job.target_tokens = job.request.prompt_tokens
        self.waiting.append(job)
        self.waiting_tokens += job.target_tokens

    # A step

    def begin(self, now: float, slowdown: float = 1.0) -> float | None:
        """Schedule a step, or several equal ones; return when it ends, None if there is nothing to do."""
        self._make_room_to_decode()
        decoding, context = self._decoding, self._context_tokens
        budget, tokens, pairs = self.profile.batched_tokens_max - decoding, 0, 0.0
        for job in list(self._prefilling.values()):
            chunk, cost = self._compute(job, budget)
            budget, tokens, pairs = budget - chunk, tokens + chunk, pairs + cost
        while self.waiting and budget > 0 and len(self._running) < self.profile.sequences_max:
            if not self._admit(self.waiting[0], now):
                break
            job = self.waiting.popleft()
            if job.importing:
                continue
            chunk, cost = self._compute(job, budget)
            budget, tokens, pairs = budget - chunk, tokens + chunk, pairs + cost
        if not tokens and not decoding:
            return None
        return self._start_steps(now, slowdown, tokens, pairs, decoding, context)

    def _start_steps(self, now: float, slowdown: float, tokens: int, pairs: float, decoding: int, context: int) -> float:
        profile = self.profile
        decodes = profile.decode_seconds_sequence * decoding + profile.decode_seconds_context_token * context
        self._began, self._slowdown = now, slowdown
        if tokens:
            computing = profile.prefill_seconds_token * tokens + profile.attention_seconds_pair * pairs
            self._first_step_seconds = max(profile.prefill_step_seconds_min, profile.prefill_step_seconds + computing + decodes)
            self._taken = 1
        else:
            self._first_step_seconds = profile.decode_step_seconds + decodes
            self._taken = self._steps_without_change()
        self.cache.reserve(decoding * (self._taken - 1))
        self.version += 1
        self.ends = now + self._seconds(self._taken)
        return self.ends

    def _steps_without_change(self) -> int:
        steps = self._finishing[0][0] - self.steps
        steps = min(steps, 1 + self.cache.room_tokens // self._decoding)
        return min(steps, CONTENDED_STEPS_MAX) if self.profile.contention else steps

    def _seconds(self, steps: int) -> float:
        grows = self.profile.decode_seconds_context_token * self._decoding if steps > 1 else 0.0
        return self._slowdown * (steps * self._first_step_seconds + grows * steps * (steps - 1) / 2)

    def interrupt(self, now: float) -> float | None:
        """Something new arrived: end a run of equal steps at its next boundary. Returns the new end, None if unchanged."""
        if self.ends is None or self._taken <= 1:
            return None
        steps = self._steps_by(now)
        if steps >= self._taken:
            return None
        self.cache.unreserve(self._decoding * (self._taken - steps))
        self._taken = steps
        self.version += 1
        self.ends = self._began + self._seconds(steps)
        return self.ends

    def _steps_by(self, now: float) -> int:
        """Return the smallest number of steps, at least one, that ends at `now` or later."""
        passed = (now - self._began) / self._slowdown
        half = self.profile.decode_seconds_context_token * self._decoding / 2
        linear = self._first_step_seconds - half
        steps = passed / linear if half == 0 else (math.sqrt(linear * linear + 4 * half * passed) - linear) / (2 * half)
        return max(1, math.ceil(steps - 1e-9))

    def complete(self, now: float) -> None:
        """The step that `begin` scheduled is done."""
        self.busy_seconds += now - self._began
        self.ends = None
        self.steps += self._taken
        self._context_tokens += self._decoding * self._taken
        self._published.publish(self.number, self._filled)
        self._filled.clear()
        for job in [job for job in self._prefilling.values() if job.left_tokens == 0]:
            self._generate(job, now)
        while self._finishing and self._finishing[0][0] <= self.steps:
            finishes, tag = heapq.heappop(self._finishing)
            found = self._running.get(tag)
            if found is not None and found.decodes_since + found.request.output_tokens - found.generated == finishes:
                self._finish(found, now)

    # A request

    def _admit(self, job: Job, now: float) -> bool:
        """Give the first waiting request its memory, or begin its import. False if it and all behind it have to wait."""
        if not job.asked:
            job.asked = now
        if not job.admitted:
            hit = self._use_local(job)
            if not self.cache.reserve(job.target_tokens - hit):
                self._let_go(job)
                return False
            job.private_tokens = job.target_tokens - hit
            job.admitted = True
            if not job.tried_import and self._begin_import(job):
                return True
        self._running[job.tag] = job
        self._prefilling[job.tag] = job
        if not job.scheduled:
            job.scheduled = now
        self.waiting_tokens -= job.ready_tokens
        return True

    def _use_local(self, job: Job) -> int:
        job.held = self.cache.match(job.chain)
        self.cache.use(job.chain[: job.held])
        held = self._covered(job, job.held)
        job.ready_tokens = useful_tokens(held, job.target_tokens, self.profile.block_tokens)
        if not job.first_token:
            job.local_tokens = job.ready_tokens
        return held

    def _let_go(self, job: Job) -> None:
        self.cache.release(job.chain[: job.held])
        job.held = job.ready_tokens = 0

    def _begin_import(self, job: Job) -> bool:
        """Ask the source's table, as the connector does; True if it holds something that is missing here."""
        job.tried_import = True
        if job.source is None:
            return False
        end = self._published.run(job.source, job.chain)
        if job.import_tokens_max is not None:
            end = min(end, -(-job.import_tokens_max // self._trace_block_tokens))
        gained = useful_tokens(self._covered(job, end), job.target_tokens, self.profile.block_tokens) - job.ready_tokens
        if end <= job.held or gained <= 0:
            return False
        job.importing = job.chain[job.held : end]
        job.import_bytes = gained * self.profile.kv_bytes_token
        self.importing += 1
        self.imports.append(job)
        return True

    def imported(self, job: Job, blocks: int) -> None:
        """The copy is done and `blocks` of the requested ones arrived intact; the job is next in line."""
        before = job.ready_tokens
        asked = job.held + len(job.importing)
        good = job.importing[:blocks]
        for block in good:
            self._share(job, block)
        self._published.publish(self.number, good)
        job.ready_tokens = useful_tokens(self._covered(job, job.held), job.target_tokens, self.profile.block_tokens)
        job.peer_tokens = job.ready_tokens - before
        job.stale_tokens = self._covered(job, asked) - self._covered(job, job.held)
        job.importing = ()
        self.importing -= 1
        self.waiting.appendleft(job)

    def _compute(self, job: Job, budget: int) -> tuple[int, float]:
        """Let the step compute what fits; return the tokens and the attention pairs."""
        chunk = min(job.left_tokens, budget)
        behind = job.ready_tokens
        job.ready_tokens += chunk
        self.waiting_tokens -= chunk
        if job.first_token:
            job.recomputed_tokens += chunk
        else:
            job.computed_tokens += chunk
        while job.held < len(job.chain) and self._covered(job, job.held + 1) <= job.ready_tokens:
            self._filled.append(job.chain[job.held])
            self._share(job, job.chain[job.held])
        return chunk, chunk * (behind + chunk / 2)

    def _share(self, job: Job, block: int) -> None:
        tokens = self._covered(job, job.held + 1) - self._covered(job, job.held)
        self.cache.share(block, tokens)
        job.private_tokens -= tokens
        job.held += 1

    def _covered(self, job: Job, count: int) -> int:
        return covered_tokens(count, job.request.prompt_tokens, self._trace_block_tokens, self.profile.block_tokens)

    def _generate(self, job: Job, now: float) -> None:
        """The prompt is computed, which yields one token; the others follow, one per step."""
        del self._prefilling[job.tag]
        if not job.first_token:
            job.first_token = now
            self.first_tokens.append(job)
        job.generated += 1
        job.decodes_since = self.steps
        if job.generated >= job.request.output_tokens:
            self._running.pop(job.tag)
            self._end(job, now)
            return
        self._decoding += 1
        self._context_tokens += job.target_tokens
        heapq.heappush(self._finishing, (self.steps + job.request.output_tokens - job.generated, job.tag))

    def _finish(self, job: Job, now: float) -> None:
        del self._running[job.tag]
        self._stop_decoding(job)
        self._end(job, now)

    def _stop_decoding(self, job: Job) -> None:
        decoded = self.steps - job.decodes_since
        job.generated += decoded
        job.private_tokens += decoded
        self._decoding -= 1
        self._context_tokens -= job.target_tokens + decoded

    def _end(self, job: Job, now: float) -> None:
        job.finished = now
        self.cache.release(job.chain[: job.held])
        whole = job.private_tokens // self.profile.block_tokens * self.profile.block_tokens
        self.cache.unreserve(job.private_tokens - whole)
        if whole:
            self.cache.leave(-1 - job.tag, whole)
        job.held = job.private_tokens = 0
        self.finished.append(job)

    def _make_room_to_decode(self) -> None:
        """Reserve a token for every decode; until there is room, preempt the request admitted last."""
        while not self.cache.reserve(self._decoding):
            tag, job = self._running.popitem()
            self.preemptions += 1
            if self._prefilling.pop(tag, None) is None:
                self._stop_decoding(job)
                self.waiting_tokens += job.request.prompt_tokens + job.generated
            else:
                self.waiting_tokens += job.ready_tokens
            if not job.first_token:
                job.recomputed_tokens += job.computed_tokens
                job.computed_tokens = job.peer_tokens = 0
            self.cache.release(job.chain[: job.held])
            self.cache.unreserve(job.private_tokens)
            job.held = job.private_tokens = job.ready_tokens = 0
            job.admitted = False
            job.target_tokens = job.request.prompt_tokens + job.generated
            self.waiting.appendleft(job)

    def _evicted(self, block: int) -> None:
        self._published.withdraw(self.number, block)
