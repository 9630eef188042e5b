"""`python -m bench.routers`: what a request costs in peerkv's gateway and, in the same run, in other routers.

The proxy under test has one core; the mock replicas and the load share the other. A request's cost is the CPU time of all the
proxy's processes divided by the number of requests, so it does not depend on how much load could be generated. Each arm is
verified first: a prompt's digest comes back from the engine, and where keys are needed nobody gets in without one. Each answer
under load is compared as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import load
from bench.arms import ARMS, DIRECT, KEY, WITHOUT, Arm, Backends, launch
from bench.cases import CASES, Case, bodies, documents
from bench.machine import LOAD_CORE, PROXY_CORE, Pinned, StartFailed, end_on_sigterm, free_ports
from bench.mock_replicas import write_config, write_limited_config, write_run_dir
from bench.report import Figures, as_json, markdown, medians, quantile, table

START_SECONDS_MAX = 30.0
SETTLE_SECONDS = 0.3
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
VERSIONS = ("aiohttp", "uvicorn", "uvloop", "httptools", "msgspec", "tokenizers")


class Bench:
    """Runs arms and cases over mock replicas that are already running."""

    def __init__(self, given: argparse.Namespace, backends: Backends, ports: Sequence[int], directory: Path) -> None:
        self.figures: list[Figures] = []
        self._given, self._backends, self._ports, self._directory = given, backends, ports, directory
        self._seed = 0

    async def arm(self, arm: Arm, turn: int, done: Callable[[], None]) -> None:
        """Start `arm`, verify it, measure its cases, stop it. Raises StartFailed and load.WrongAnswer."""
        if arm.name == DIRECT:
            await self._cases(arm, turn, load.Target(self._ports[0]), None, done)
            return
        port, spare = free_ports(2)
        log = self._directory / f"{arm.name.replace(' ', '-')}.log"
        how = launch(arm, self._backends, port, spare)
        proxy = Pinned(how.argv, PROXY_CORE, log, how.env)
        try:
            target = load.Target(port, KEY if arm.authenticates else "")
            await self._until_it_serves(proxy, target)
            await self._prove(arm, target)
            await self._cases(arm, turn, target, proxy, done)
            if arm.name.startswith("peerkv") and not arm.authenticates:
                self._prove_steering(port)
        finally:
            proxy.end()

    async def _until_it_serves(self, proxy: Pinned, target: load.Target) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            proxy.check()
            try:
                await load.prove(target, self._given.endpoint, "ready?")
                break
            except (OSError, load.WrongAnswer) as error:
                if time.monotonic() > deadline:
                    raise StartFailed(f"not ready in {START_SECONDS_MAX:g} s: {error}; {proxy.tail()}") from error
                await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE_SECONDS + (self._given.parity_seconds if "peerkv" in proxy.log.name else 0))

    async def _prove(self, arm: Arm, target: load.Target) -> None:
        for text in ('Grüße — “naïve” façade 日本語 👩‍👩‍👧‍👦 \\ " \n\t', *(documents(case.characters)[0] for case in CASES)):
            await load.prove(target, self._given.endpoint, text)
        if arm.authenticates and await load.status_without_key(target.port, self._given.endpoint) != 401:
            raise load.WrongAnswer(f"{arm.name} serves callers without a key")

    def _prove_steering(self, port: int) -> None:
        """Check that the replicas' reports of prefix hits arrived. Raises WrongAnswer."""
        told = httpx.get(f"http://127.0.0.1:{port}/kv/stats", timeout=START_SECONDS_MAX).json()["ledger"]
        if not told["settled"] or (self._given.prompts != "fresh" and not told["local_tokens"]):
            raise load.WrongAnswer(f"no prefix hit was delivered: {told}")

    async def _cases(self, arm: Arm, turn: int, target: load.Target, proxy: Pinned | None, done: Callable[[], None]) -> None:
        for case in self._given.cases:
            self.figures.append(await self._case(arm, turn, case, target, proxy))
            done()

    async def _case(self, arm: Arm, turn: int, case: Case, target: load.Target, proxy: Pinned | None) -> Figures:
        given = self._given
        self._seed += 1 << 20
        source = bodies(case, given.prompts, given.endpoint, self._seed)
        await load.run(target, case, given.endpoint, source, given.warm_seconds, 0.0)
        cpu = proxy.cpu_seconds() if proxy else 0.0
        own = time.process_time()
        samples = await load.run(target, case, given.endpoint, source, 0.0, given.seconds)
        own = time.process_time() - own
        spent = proxy.cpu_seconds() - cpu if proxy else 0.0
        count = len(samples.seconds)
        return Figures(
            arm=arm.name,
            case=case.name,
            round=turn,
            requests=count,
            per_second=count / samples.wall_seconds,
            proxy_cpu_us=spent / count * 1e6 if proxy else None,
            load_cpu_us=own / count * 1e6,
            p50_ms=quantile(samples.seconds, 0.5) * 1e3,
            p99_ms=quantile(samples.seconds, 0.99) * 1e3,
            longest_ms=max(samples.seconds) * 1e3,
            stalls=sum(second > load.STALL_SECONDS for second in samples.seconds),
            resident_mib=proxy.resident_bytes() / (1 << 20) if proxy else None,
        )


async def measure(given: argparse.Namespace, console: Console) -> tuple[list[Figures], list[str]]:
    """Run all rounds, reversing the order of the arms in every second one. Returns the figures and the failures."""
    failed: list[str] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-", dir="/tmp")))
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-tables-", dir="/dev/shm")))
        ports = free_ports(2)
        sockets = write_run_dir(directory / "run", shared, given.model, os.getpid())
        argv = [sys.executable, "-m", "bench.backend", "--model", given.model]
        argv += ["--table-dir", str(shared), "--endpoint", given.endpoint]
        for port, socket in zip(ports, sockets, strict=True):
            argv += ["--port", str(port), "--socket", socket]
        backend = Pinned(argv, LOAD_CORE, directory / "backend.log", {})
        stack.callback(backend.end)
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        configs = write_config(directory), write_limited_config(directory)
        backends = Backends(urls, directory / "run", *configs, given.venv / "bin")
        bench = Bench(given, backends, ports, directory)
        await bench._until_it_serves(backend, load.Target(ports[0]))
        columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=given.rounds * len(given.arms) * len(given.cases))
            for turn in range(given.rounds):
                for arm in given.arms if turn % 2 == 0 else reversed(given.arms):
                    progress.update(bar, description=f"round {turn + 1}: {arm.name}")
                    try:
                        await bench.arm(arm, turn, lambda: progress.advance(bar))
                    except (StartFailed, load.WrongAnswer, OSError) as error:
                        failed.append(f"round {turn + 1}: {arm.name}: {error}")
                        console.print(f"[red]{arm.name}: {error}", highlight=False, markup=True)
    return bench.figures, failed


def install(venv: Path, console: Console) -> None:
    """Create the other routers' environment. Raises CalledProcessError."""
    console.print(f"installing {REQUIREMENTS} into {venv}")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", "-r", str(REQUIREMENTS)], check=True)


def _about(given: argparse.Namespace) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m bench.routers {' '.join(sys.argv[1:])}".strip(),
        "processor": f"{os.cpu_count()} x {model}",
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "load_average_before": os.getloadavg(),
        "prompts": given.prompts,
        "endpoint": given.endpoint,
        "seconds": given.seconds,
    }


def _chosen(text: str, known: Sequence[Any], what: str) -> list[Any]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in [each.name for each in known]]
    if unknown:
        raise argparse.ArgumentTypeError(f"no {what} '{unknown[0]}'; there are: {', '.join(each.name for each in known)}")
    return [each for each in known if each.name in names]


def _parse() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peerkv"
    parser = argparse.ArgumentParser(prog="bench.routers", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; each arm runs once per round (default: 3)")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured time per case (default: 2)")
    parser.add_argument("--warm-seconds", type=float, default=0.4, help="warm-up load before that (default: 0.4)")
    parser.add_argument("--parity-seconds", type=float, default=1.5, help="time for peerkv to compare token ids (default: 1.5)")
    arms = ", ".join(arm.name for arm in (*ARMS, *WITHOUT))
    parser.add_argument(
        "--arms", type=lambda text: _chosen(text, (*ARMS, *WITHOUT), "arm"), default=list(ARMS), help=f"of: {arms}"
    )
    cases = ", ".join(case.name for case in CASES)
    parser.add_argument("--cases", type=lambda text: _chosen(text, CASES, "case"), default=list(CASES), help=f"of: {cases}")
    parser.add_argument(
        "--prompts", choices=("tail", "same", "fresh"), default="tail", help="what prompts share (default: tail)"
    )
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--model", default=os.environ.get("PEERKV_MODEL", ""), help="directory with the tokenizer")
    parser.add_argument("--venv", type=Path, default=cache / "bench-routers", help="virtual environment of the other routers")
    parser.add_argument("--install", action="store_true", help="create that environment first")
    parser.add_argument("--output", type=Path, help="write all figures to this file as JSON, and tables next to it as Markdown")
    return parser.parse_args()


def main() -> int:
    """Measure and print; status 1 if something failed."""
    given = _parse()
    console = Console(width=110)
    end_on_sigterm()
    if (os.cpu_count() or 1) < 2:
        console.print("this needs two cores: one for the proxy, one for the load")
        return 2
    if given.install:
        install(given.venv, console)
    if not given.model:
        console.print("name the model's directory: --model DIR (`python -m engine.default_model` prints the default model's)")
        return 2
    os.sched_setaffinity(0, {LOAD_CORE})
    count = len(given.arms) * len(given.cases) * given.rounds
    console.print(
        f"{len(given.arms)} proxies, {len(given.cases)} cases, {given.rounds} rounds, {given.prompts}, {given.endpoint}: "
        f"about {count * (given.seconds + given.warm_seconds) / 60 + len(given.arms) * given.rounds / 20:.0f} min"
    )
    about = _about(given)
    figures, failed = uvloop.run(measure(given, console))
    rows = medians(figures)
    for case in given.cases:
        if any(row["case"] == case.name for row in rows):
            console.print(table(rows, case.name))
    if given.output is not None:
        given.output.write_text(json.dumps(as_json(figures, rows, about | {"failed": failed}), indent=1))
        ours = [arm.name for arm in given.arms if arm.name.startswith("peerkv")]
        given.output.with_suffix(".md").write_text(markdown(figures, rows, ours))
        console.print(f"all figures: {given.output}, as tables: {given.output.with_suffix('.md')}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
