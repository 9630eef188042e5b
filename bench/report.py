"""Medians over rounds, as a table and as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from bench.arms import DIRECT
from bench.cases import CASES


@dataclass(frozen=True, slots=True)
class Figures:
    """One arm in one case of one round."""

    arm: str
    case: str
    round: int
    requests: int
    per_second: float
    proxy_cpu_us: float | None
    load_cpu_us: float
    p50_ms: float
    p99_ms: float
    longest_ms: float
    stalls: int
    resident_mib: float | None


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def medians(figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """Return medians over the rounds per arm and case; latencies at one connection also relative to no proxy."""
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys((each.case, each.arm) for each in figures):
        mine = [each for each in figures if (each.case, each.arm) == key]
        row: dict[str, Any] = {"case": key[0], "arm": key[1], "rounds": len(mine)}
        for name in ("per_second", "proxy_cpu_us", "load_cpu_us", "p50_ms", "p99_ms", "longest_ms", "stalls", "resident_mib"):
            values = [value for each in mine if (value := getattr(each, name)) is not None]
            row[name] = statistics.median(values) if values else None
        rows.append(row)
    direct = {row["case"]: row for row in rows if row["arm"] == DIRECT}
    for row in rows:
        base = direct.get(row["case"])
        cpu = row["proxy_cpu_us"]
        row["per_core_second"] = 1e6 / cpu if cpu else None
        for name in ("p50_ms", "p99_ms"):
            row[f"added_{name}"] = row[name] - base[name] if base is not None and row is not base else None
    return rows


def table(rows: Sequence[dict[str, Any]], case: str) -> Table:
    """Return one case as a table, the cheapest proxy first."""
    lonely = next(each for each in CASES if each.name == case).connections == 1
    title = f"{case}: medians of {max(row['rounds'] for row in rows)} rounds"
    shown = Table("proxy", "done/s", "CPU µs per request", "req per core-second", title=title, title_justify="left")
    for heading in ("added p50 ms", "added p99 ms", "stalls") if lonely else ("p50 ms", "p99 ms", "MiB"):
        shown.add_column(heading, justify="right")
    for column in shown.columns[1:4]:
        column.justify = "right"
    mine = [row for row in rows if row["case"] == case]
    for row in sorted(mine, key=lambda row: row["proxy_cpu_us"] or 0.0):
        last = ("added_p50_ms", "added_p99_ms", "stalls") if lonely else ("p50_ms", "p99_ms", "resident_mib")
        cells = [_number(row[name], 2 if name.endswith("_ms") else 0) for name in last]
        shown.add_row(
            row["arm"], _number(row["per_second"]), _number(row["proxy_cpu_us"]), _number(row["per_core_second"]), *cells
        )
    return shown


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def markdown(figures: Sequence[Figures], rows: Sequence[dict[str, Any]], ours: Sequence[str]) -> str:
    """Return tables of the medians with a column per case, and of CPU time relative to `ours` in the same round."""
    cases = [case.name for case in CASES if any(row["case"] == case.name for row in rows)]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    at = {(row["arm"], row["case"]): row for row in rows}

    def lines(title: str, cell: Callable[[str, str], str], chosen: Sequence[str] = cases) -> list[str]:
        made = [f"| {title} | {' | '.join(chosen)} |", "|---" * (1 + len(chosen)) + "|"]
        for arm in arms:
            cells = [cell(arm, case) if (arm, case) in at else "" for case in chosen]
            made += [f"| {arm} | {' | '.join(cells)} |"] if any(cells) else []
        return [*made, ""]

    def median(name: str, digits: int = 0) -> Callable[[str, str], str]:
        return lambda arm, case: _number(at[arm, case][name], digits)

    lonely = [case.name for case in CASES if case.connections == 1 and case.name in cases]
    found = lines("CPU µs a request", median("proxy_cpu_us"))
    for mine in ours:
        found += lines(f"its CPU / that of {mine}", lambda arm, case, mine=mine: _ratio(figures, arm, mine, case))  # type: ignore[misc]
    found += lines("requests per second, the load on the other core", median("per_second"))
    found += lines("added p50, ms", median("added_p50_ms", 2), lonely)
    found += lines("added p99, ms", median("added_p99_ms", 2), lonely)
    found += lines("the longest, ms", median("longest_ms", 1), lonely)
    found += lines("resident MiB", median("resident_mib"), [case for case in cases if case not in lonely])
    return "\n".join(found)


def _ratio(figures: Sequence[Figures], arm: str, ours: str, case: str) -> str:
    """Return the median of the rounds' ratios, with the least and the most."""
    spent = {(each.arm, each.round): each.proxy_cpu_us for each in figures if each.case == case}
    pairs = [(spent[arm, turn], mine) for (name, turn), mine in spent.items() if name == ours and (arm, turn) in spent]
    ratios = [theirs / mine for theirs, mine in pairs if theirs and mine]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios and arm != ours else ""


def as_json(figures: Sequence[Figures], rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Return what is written to the JSON file."""
    return {"about": about, "medians": list(rows), "runs": [asdict(each) for each in figures]}
