"""What to run, and running it: this is where traces are read and scaled, policies built, and the real clock is read."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.simulate.peerkv import PeerKV, Reach
from bench.simulate.policies import FIELD_POLICIES, Policy
from bench.simulate.profiles import Profile
from bench.simulate.report import Run, in_a_line
from bench.simulate.simulation import Fleet, Simulation
from bench.simulate.summary import Setting, decision_cost, summarize
from bench.simulate.traces import Conversations, Trace, made_up, read_mooncake, scaled
from bench.simulate.workloads import shape_for, workload

OWN_POLICIES: dict[str, Reach] = {"peerkv": "fleet", "peerkv-within-hosts": "host", "peerkv-no-imports": "none"}
"""How far each of our own policies exchanges KV."""
REPLICAS_EACH_COPY = 8
PROGRESS_SECONDS = 5.0
WORKLOAD_REQUESTS = 300


@dataclass(frozen=True, slots=True)
class Task:
    """One run. Without a `trace`, a workload or conversations are generated; `copies` defaults to one per 8 replicas."""

    trace: Path | None
    requests_max: int | None
    profile: Profile
    policy: str
    replicas: int
    rate: float
    copies: int | None
    seed: int
    workload: str = ""


def make_run(task: Task, say: Callable[[str], None]) -> Run:
    """Play it. Raises TraceRefused."""
    copies = task.copies or max(1, task.replicas // REPLICAS_EACH_COPY)
    trace = scaled(_read(task), rate=task.rate, copies=copies, seed=task.seed)
    fleet = Fleet(task.profile, task.replicas, trace.block_tokens)
    policy = build_policy(task.policy, fleet, task.seed)
    what = f"{task.policy}, {task.replicas} replicas, x{task.rate:g}"
    began = time.perf_counter()
    tell = _Progress(what, len(trace.requests), say)
    played = Simulation(trace, fleet, policy, stopwatch=time.perf_counter, progress=tell).run()
    setting = Setting(trace.name, task.profile.name, task.policy, task.replicas, task.rate, copies, task.seed)
    actions = dict(sorted(policy.actions.items())) if isinstance(policy, PeerKV) else {}
    run = Run(summarize(played, setting), decision_cost(played), time.perf_counter() - began, actions)
    say(f"{what}: {in_a_line(run)}")
    return run


def build_policy(name: str, fleet: Fleet, seed: int) -> Policy:
    """Return the policy of that name for the fleet. Raises KeyError if there is none."""
    if name in OWN_POLICIES:
        return PeerKV(fleet, OWN_POLICIES[name], device="cpu" if fleet.profile.on_cpu else "cuda")
    return FIELD_POLICIES[name](fleet.replicas, fleet.trace_block_tokens, seed)


def _read(task: Task) -> Trace:
    if task.trace is not None:
        return read_mooncake(task.trace, requests_max=task.requests_max)
    if task.workload:
        return workload(task.workload, shape_for(task.profile), task.requests_max or WORKLOAD_REQUESTS, task.seed)
    shape = Conversations(conversations=(task.requests_max or 2000) // Conversations().turns)
    return made_up(shape, task.seed)


class _Progress:
    def __init__(self, what: str, requests: int, say: Callable[[str], None]) -> None:
        self._what, self._requests, self._say = what, requests, say
        self._said = time.monotonic()

    def __call__(self, finished: int, now: float) -> None:
        if time.monotonic() - self._said >= PROGRESS_SECONDS:
            self._said = time.monotonic()
            self._say(f"{self._what}: {finished} of {self._requests} requests, {now:.0f} simulated seconds")
