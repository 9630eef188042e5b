"""Plays a trace against a simulated fleet: a queue of events in simulated seconds, the same for the same inputs."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from bench.simulate.engine import Engine
from bench.simulate.jobs import Job, cacheable
from bench.simulate.links import Copy, Links
from bench.simulate.policies import Choice, Policy
from bench.simulate.profiles import Profile
from bench.simulate.published import PublishedBlocks
from bench.simulate.traces import Trace, TraceRequest

PROGRESS_EVENTS = 4096


class _Event(IntEnum):
    SUBMIT = 0
    STEP = 1
    COPY_BEGINS = 2
    COPY_ENDS = 3


@dataclass(slots=True)
class Fleet:
    """The replicas, their block tables, and the links between them."""

    profile: Profile
    replicas: int
    trace_block_tokens: int
    published: PublishedBlocks = field(init=False)
    links: Links = field(init=False)
    engines: list[Engine] = field(init=False)

    def __post_init__(self) -> None:
        self.published = PublishedBlocks(self.replicas)
        self.links = Links(self.profile.links)
        self.engines = [
            Engine(number, self.profile.engine, self.trace_block_tokens, self.published) for number in range(self.replicas)
        ]


@dataclass(slots=True)
class Played:
    """The result of a run: every request of the trace, and the fleet after the last one."""

    jobs: list[Job]
    fleet: Fleet
    seconds: float
    decision_seconds: list[float]


class Simulation:
    """One run of `trace` with `policy` on `fleet`.

    `stopwatch` times the policy's decisions in real seconds; nothing simulated depends on it. `progress` is called from time to
    time with the number of finished requests and the simulated time.
    """

    def __init__(
        self,
        trace: Trace,
        fleet: Fleet,
        policy: Policy,
        *,
        stopwatch: Callable[[], float] = lambda: 0.0,
        progress: Callable[[int, float], None] = lambda finished, now: None,
    ) -> None:
        self._trace = trace
        self._fleet = fleet
        self._policy = policy
        self._stopwatch = stopwatch
        self._progress = progress
        self._events: list[tuple[float, int, _Event, Any, int]] = []
        self._order = 0
        self._computing = 0
        self._jobs: list[Job] = []
        self._finished = 0
        self._decision_seconds: list[float] = []

    def run(self) -> Played:
        """Play the whole trace until the last answer is complete."""
        arrivals = iter(self._trace.requests)
        request = next(arrivals, None)
        now, handled = 0.0, 0
        while request is not None or self._events:
            handled += 1
            if handled % PROGRESS_EVENTS == 0:
                self._progress(self._finished, now)
            if request is not None and (not self._events or request.arrival <= self._events[0][0]):
                now = request.arrival
                self._arrive(request, now)
                request = next(arrivals, None)
                continue
            now, _, kind, what, version = heapq.heappop(self._events)
            self._handle(kind, what, version, now)
        self._progress(self._finished, now)
        return Played(self._jobs, self._fleet, now, self._decision_seconds)

    def _at(self, when: float, kind: _Event, what: object, version: int = 0) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, kind, what, version))

    def _handle(self, kind: _Event, what: Any, version: int, now: float) -> None:
        if kind is _Event.STEP:
            if what.version == version:
                self._step_done(what, now)
        elif kind is _Event.SUBMIT:
            engine = self._fleet.engines[what.replica]
            engine.submit(what)
            self._wake(engine, now)
        elif kind is _Event.COPY_BEGINS:
            self._due(self._fleet.links.start(what, now))
        elif what.version == version:
            self._due(self._fleet.links.end(what, now))
            self._copied(what, now)

    def _arrive(self, request: TraceRequest, now: float) -> None:
        engine_profile = self._fleet.profile.engine
        chain = cacheable(request, self._trace.block_tokens, engine_profile.block_tokens)
        job = Job(len(self._jobs), request, chain, arrived=now)
        self._jobs.append(job)
        began = self._stopwatch()
        choice: Choice = self._policy.choose(job, now)
        self._decision_seconds.append(self._stopwatch() - began)
        job.replica, job.source = choice.replica, choice.source
        job.import_tokens_max, job.planned_tokens = choice.import_tokens_max, choice.planned_tokens
        handling = engine_profile.request_seconds + engine_profile.request_seconds_token * request.prompt_tokens
        self._at(now + handling, _Event.SUBMIT, job)

    def _wake(self, engine: Engine, now: float) -> None:
        """An engine has something new: it begins, or notices it at the end of its current step."""
        if engine.ends is None:
            self._begin(engine, now)
        else:
            sooner = engine.interrupt(now)
            if sooner is not None:
                self._at(sooner, _Event.STEP, engine, engine.version)

    def _begin(self, engine: Engine, now: float) -> None:
        ends = engine.begin(now, 1.0 + self._fleet.profile.engine.contention * self._computing)
        if ends is not None:
            self._computing += 1
            self._at(ends, _Event.STEP, engine, engine.version)
        for job in engine.imports:
            self._import(job, now)
        engine.imports.clear()

    def _step_done(self, engine: Engine, now: float) -> None:
        self._computing -= 1
        engine.complete(now)
        for job in engine.first_tokens:
            self._policy.first_byte(job, now)
        for job in engine.finished:
            self._policy.finished(job, now)
        self._finished += len(engine.finished)
        engine.first_tokens.clear()
        engine.finished.clear()
        self._begin(engine, now)

    def _import(self, job: Job, now: float) -> None:
        assert job.source is not None
        across = self._fleet.links.across_hosts(job.source, job.replica)
        copy = Copy(job.source, job.replica, job.import_bytes, job.tag, across)
        job.import_seconds = -now
        self._at(now + self._fleet.links.seconds_before(copy), _Event.COPY_BEGINS, copy)

    def _due(self, copies: list[Copy]) -> None:
        for copy in copies:
            self._at(copy.due, _Event.COPY_ENDS, copy, copy.version)

    def _copied(self, copy: Copy, now: float) -> None:
        """Model the check after a copy: reject blocks that the owner has evicted in the meantime, and those after them."""
        job = self._jobs[copy.tag]
        job.import_seconds += now
        good = self._fleet.published.run(copy.owner, job.importing)
        engine = self._fleet.engines[copy.importer]
        engine.imported(job, good)
        self._wake(engine, now)
