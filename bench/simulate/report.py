"""Tables, JSON and a picture of simulated runs."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from bench.simulate.summary import DecisionCost, Summary
from gateway.cli.plot import line_chart

_COLUMNS = (
    "policy", "p50 s", "p90 s", "p99 s", "hit %", "peer %", "computed M", "imbalance", "GB within hosts", "GB across",
    "preempted", "drain s", "µs per decision",
)  # fmt: skip
TABLE_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class Run:
    """A run's figures; `decisions` and `wall_seconds` are the simulating machine's, `actions` what steering did how often."""

    summary: Summary
    decisions: DecisionCost
    wall_seconds: float
    actions: dict[str, int]


def print_runs(runs: Sequence[Run], *, to: Console | None = None) -> None:
    """Print one table for each size of the fleet and rate, policies in the order in which they were played."""
    console = to or wide_console()
    groups: dict[tuple[int, float], list[Run]] = {}
    for run in runs:
        setting = run.summary.setting
        groups.setdefault((setting.replicas, setting.rate), []).append(run)
    for (replicas, rate), group in groups.items():
        first = group[0].summary
        title = f"{replicas} replicas, rate x{rate:g} ({first.requests_second:.1f} requests/s, {first.requests} requests)"
        table = Table(title=title, title_justify="left", box=MARKDOWN)
        for name in _COLUMNS:
            table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
        for run in group:
            table.add_row(*_row(run))
        console.print(table)


def wide_console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=TABLE_CHARACTERS)


def _row(run: Run) -> tuple[str, ...]:
    it = run.summary
    return (
        it.setting.policy,
        f"{it.ttft_p50:.3f}",
        f"{it.ttft_p90:.3f}",
        f"{it.ttft_p99:.2f}",
        f"{100 * it.hit_share:.1f}",
        f"{100 * it.peer_share:.1f}",
        f"{it.computed_tokens / 1e6:.1f}",
        f"{it.imbalance:.2f}",
        f"{it.bytes_within_host / 1e9:.0f}",
        f"{it.bytes_across_hosts / 1e9:.0f}",
        str(it.preemptions),
        f"{it.drain_seconds:.0f}",
        f"{run.decisions.mean * 1e6:.0f}",
    )


def as_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Return `runs`, deterministic, and `measured`, which is not, in the same order."""
    return {
        "runs": [asdict(run.summary) | {"actions": run.actions} for run in runs],
        "measured": [{"decision_seconds": asdict(run.decisions), "wall_seconds": run.wall_seconds} for run in runs],
    }


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write a chart of the p90 time to first token over the rate for each size of the fleet, the largest size's to `path`.

    Others go beside it, with the number of replicas in their names. Raises OSError.
    """
    sizes = sorted({run.summary.setting.replicas for run in runs})
    for size in sizes:
        lines: dict[str, list[tuple[float, float]]] = {}
        for run in sorted(runs, key=lambda run: run.summary.setting.rate):
            if run.summary.setting.replicas == size:
                lines.setdefault(run.summary.setting.policy, []).append((run.summary.setting.rate, run.summary.ttft_p90))
        trace = runs[0].summary.setting.trace
        picture = line_chart(f"{trace}, {size} replicas", "rate, times the trace's", "time to first token, p90, s", lines)
        target = path if size == sizes[-1] else path.with_name(f"{path.stem}-{size}{path.suffix}")
        target.write_text(picture)


def in_a_line(run: Run) -> str:
    """Return the main figures of a run, for people waiting for the other runs."""
    it, network = run.summary, run.summary.bytes_across_hosts / 1e9
    ttft = f"p50 {it.ttft_p50:.3f}, p90 {it.ttft_p90:.3f}, p99 {it.ttft_p99:.2f} s"
    return f"{ttft}; {it.hit_share:.1%} hit, {network:.0f} GB across hosts, {run.decisions.p50 * 1e6:.0f} µs a decision"


def say(text: str) -> None:
    """Print the run's main figures."""
    print(text, file=sys.stderr, flush=True)
