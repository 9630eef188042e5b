"""Results of bench.pools: the rate at the bound, ratios within rounds, and where the tokens came from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.engines import Counts
from bench.pools.rate_search import Sure
from bench.pools.sources import Sources

_SIGNS: Mapping[Sure, str] = {"between": "", "at least": "≥ ", "at most": "≤ "}


@dataclass(frozen=True, slots=True)
class Step:
    """One rate. Requests per second, asked and done; seconds to the first token."""

    rate: float
    requests: int
    p50: float
    p90: float
    requests_per_second: float


@dataclass(frozen=True, slots=True)
class PoolRun:
    """One arm in one round: the steps in the order in which they were played, what they had together, and what follows."""

    arm: str
    round: int
    steps: tuple[Step, ...]
    counts: Counts
    sources: Sources
    rate: float
    sure: Sure

    def line(self) -> str:
        """Return it in one line, for people who are waiting."""
        steps = ", ".join(f"{step.rate:.2f}/s {step.p90:.2f} s" for step in self.steps)
        return f"round {self.round + 1} {self.arm:36}{_SIGNS[self.sure]}{self.rate:.2f}/s at the bound; p90: {steps}"

    def shares(self) -> dict[str, float]:
        """Return which part of the prompt tokens came from where."""
        known = {"computed": self.counts.computed, "own KV cache": self.counts.local, "own region": self.sources.own_region}
        known |= {"other regions": self.sources.other_regions, "other KV caches": self.sources.caches}
        return {name: tokens / max(1, sum(known.values())) for name, tokens in known.items()}


def markdown(runs: Sequence[PoolRun], base: str, about: Mapping[str, Any]) -> str:
    """Return a table: rates at the bound, `base`'s rate divided by each arm's in the same round, shares of prompt tokens."""
    if not runs:
        return "nothing was measured"
    heads = ("requests per second", f"{base} / this", *runs[0].shares())
    parts = [
        f"{about['date']}, {about['processor']}, {about['gpus'] or 'no GPU'}; {about['versions']}; load average "
        f"{about['load_average'][0]:.1f}\n\n`{about['command']}`\n",
        about["workload"] + "\n",
        f"| arm | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}",
    ]
    own = {run.round: run for run in runs if run.arm == base}
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        paired = [(own[run.round], run) for run in mine if run.round in own and arm != base]
        cells = [_cell(mine, lambda run: run.rate), _ratio(paired)]
        cells += [f"{100 * statistics.median(run.shares()[name] for run in mine):.0f} %" for name in mine[0].shares()]
        parts.append(f"| {arm} | {' | '.join(cells)} |")
    parts.append("\nMedian (least to most) of the rounds; shares of all prompt tokens of the steps that an arm was tried at.")
    return "\n".join(parts)


def _cell(runs: Sequence[PoolRun], read: Callable[[PoolRun], float]) -> str:
    return _spread([read(run) for run in runs], {run.sure for run in runs})


def _ratio(pairs: Sequence[tuple[PoolRun, PoolRun]]) -> str:
    """Return the ratios; where only a bound of one of the rates is known, a bound of the ratio, or nothing."""
    if not pairs:
        return ""
    inverse: Mapping[Sure, Sure] = {"between": "between", "at least": "at most", "at most": "at least"}
    sure = {base.sure for base, _ in pairs} | {inverse[run.sure] for _, run in pairs}
    return _spread([base.rate / run.rate for base, run in pairs], sure)


def _spread(values: Sequence[float], sure: set[Sure]) -> str:
    bounds = sure - {"between"}
    if len(bounds) > 1:
        return "-"
    sign = _SIGNS[next(iter(bounds), "between")]
    return f"{sign}{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def as_json(runs: Sequence[PoolRun], failed: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written to the JSON file."""
    return {"about": dict(about), "failed": list(failed), "runs": [asdict(run) for run in runs]}


def from_json(told: Mapping[str, Any]) -> tuple[list[PoolRun], dict[str, Any]]:
    """Read back what as_json made."""
    runs = [
        PoolRun(
            **run
            | {
                "steps": tuple(Step(**step) for step in run["steps"]),
                "counts": Counts(**run["counts"]),
                "sources": Sources(**run["sources"]),
            }
        )
        for run in told["runs"]
    ]
    return runs, told["about"]
