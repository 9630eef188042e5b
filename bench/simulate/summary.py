"""Figures of a simulated run; the same inputs give the same figures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bench.simulate.jobs import Job
from bench.simulate.simulation import Played


@dataclass(frozen=True, slots=True)
class Setting:
    """What was played: `requests_second` is the mean rate of arrival."""

    trace: str
    profile: str
    policy: str
    replicas: int
    rate: float
    copies: int
    seed: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Times to first token are seconds from arrival to the client's first byte; shares are of all prompt tokens.

    `imbalance` is the busiest replica's computed prompt tokens over the mean; `drain_seconds` passed from the last arrival to
    the end; `utilization` is the share of time in which replicas computed anything.
    """

    setting: Setting
    requests: int
    requests_second: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    ttft_mean: float
    token_seconds_p50: float
    local_share: float
    peer_share: float
    prompt_tokens: int
    computed_tokens: int
    recomputed_tokens: int
    stale_tokens: int
    imports: int
    bytes_within_host: int
    bytes_across_hosts: int
    imbalance: float
    utilization: float
    preemptions: int
    drain_seconds: float
    seconds: float

    @property
    def hit_share(self) -> float:
        """Prompt tokens that were not computed."""
        return self.local_share + self.peer_share


@dataclass(frozen=True, slots=True)
class DecisionCost:
    """Real seconds per decision of the policy's code on the simulating machine; never the same twice."""

    mean: float
    p50: float
    p99: float


def ttft_seconds(played: Played) -> list[float]:
    """Return each request's time to first token, in the order of arrival."""
    response = played.fleet.profile.engine.response_seconds
    return [job.first_token + response - job.arrived for job in played.jobs]


def summarize(played: Played, setting: Setting) -> Summary:
    """Return the figures of a run. Raises ValueError if it had no requests."""
    if not played.jobs:
        raise ValueError("no requests")
    jobs, fleet = played.jobs, played.fleet
    ttft = np.array(ttft_seconds(played))
    p50, p90, p99 = np.percentile(ttft, (50, 90, 99)).tolist()
    prompt = sum(job.request.prompt_tokens for job in jobs)
    computed_at = np.zeros(fleet.replicas)
    for job in jobs:
        computed_at[job.replica] += job.computed_tokens
    last_arrival = jobs[-1].arrived
    moved = fleet.links.moved
    return Summary(
        setting=setting,
        requests=len(jobs),
        requests_second=len(jobs) / last_arrival if last_arrival else 0.0,
        ttft_p50=p50,
        ttft_p90=p90,
        ttft_p99=p99,
        ttft_mean=float(ttft.mean()),
        token_seconds_p50=_token_seconds(jobs),
        local_share=sum(job.local_tokens for job in jobs) / prompt,
        peer_share=sum(job.peer_tokens for job in jobs) / prompt,
        prompt_tokens=prompt,
        computed_tokens=sum(job.computed_tokens for job in jobs),
        recomputed_tokens=sum(job.recomputed_tokens for job in jobs),
        stale_tokens=sum(job.stale_tokens for job in jobs),
        imports=sum(job.import_bytes > 0 for job in jobs),
        bytes_within_host=moved.within_host,
        bytes_across_hosts=moved.across_hosts,
        imbalance=float(computed_at.max() / computed_at.mean()),
        utilization=sum(engine.busy_seconds for engine in fleet.engines) / (fleet.replicas * played.seconds),
        preemptions=sum(engine.preemptions for engine in fleet.engines),
        drain_seconds=played.seconds - last_arrival,
        seconds=played.seconds,
    )


def decision_cost(played: Played) -> DecisionCost:
    """Return the stopwatch's figures for the run's decisions."""
    taken = np.array(played.decision_seconds)
    return DecisionCost(float(taken.mean()), *np.percentile(taken, (50, 99)).tolist())


def _token_seconds(jobs: Sequence[Job]) -> float:
    """The median of the mean time between an answer's tokens."""
    times = [
        (job.finished - job.first_token) / (job.request.output_tokens - 1) for job in jobs if job.request.output_tokens > 1
    ]
    return float(np.median(times)) if times else 0.0
