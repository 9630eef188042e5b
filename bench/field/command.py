"""`python -m bench.field`: two real vLLM replicas behind peerkv and behind other routers, in one run.

The same two engine processes serve every arm: bench.tcp_beside_unix opens a TCP port beside each unix socket. Prefix caches are
emptied between runs, prompts are fresh, arrival times are the same for all arms of a round. Requests of the other arms carry a
hint to import nothing, and the engines' counters must confirm it. Computed tokens are counted by vLLM's own /metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.child_process import Started
from bench.engines import Engines
from bench.field.arms import FieldArm, command
from bench.field.flags import NUMBERED, parse, write_chat_model
from bench.field.front_door import wait_until_peerkv_serves, wait_until_router_serves
from bench.field.report import Figures, about, as_json, figures_of, from_json, markdown, seconds_until_back
from bench.machine import StartFailed, end_on_sigterm, free_ports
from bench.open_loop import Player
from bench.routers import install
from bench.workloads import Size, Talk, Turn, Workload
from gateway.cli.bench.words import COMMON, Words

ARM_SECONDS_MAX = 60.0
WARM_REQUESTS = 6
MODEL = "field"


class ArmFailed(Exception):
    """A run does not count; the message says why."""


class Field:
    """Runs arms over engines that are already serving."""

    def __init__(self, given: argparse.Namespace, engines: Engines, directory: Path) -> None:
        self._given, self._engines, self._directory = given, engines, directory

    def run(self, arm: FieldArm, workload: Workload, turn: int) -> Figures:
        """Start `arm`, play the workload, stop it. Raises StartFailed, ArmFailed, httpx.HTTPError."""
        port, spare = free_ports(2)
        argv, env = command(arm, self._engines, self._given.venv / "bin", port, spare)
        url = f"http://127.0.0.1:{port}"
        log = self._directory / f"{arm.name.replace(' ', '-')}-{workload.name}-{turn}.log"
        process = Started(argv, log, env)
        try:
            self._wait(process, url, arm)
            self._engines.forget()
            self._play(arm, url, self._warm_up(), "warm")
            self._engines.forget()
            self._fill(arm, url, workload, turn)
            before = self._engines.counts()
            _post(url, workload.then)
            player, wall = self._play(arm, url, self._talks(arm, workload, turn), "run")
            counts = self._engines.counts().since(before)
            ledger = httpx.get(f"{url}/kv/stats", timeout=ARM_SECONDS_MAX).json()["ledger"] if arm.peerkv else None
        finally:
            process.end()
        if counts.peer and not arm.imports:
            raise ArmFailed(f"{counts.peer} tokens were imported though nothing should be")
        back = seconds_until_back(player.samples) if workload.then else None
        found = figures_of(arm.name, workload.name, turn, player.samples, wall, counts)
        return replace(found, ledger=ledger, back_seconds=back)

    def _fill(self, arm: FieldArm, url: str, workload: Workload, turn: int) -> None:
        """Bring the fleet to where the workload begins."""
        _post(url, workload.first)
        if workload.warm is not None:
            words = self._words(f"{self._given.seed} {workload.name} {turn} {arm.name}")
            self._play(arm, url, workload.warm(self._given.size, words), "fill")

    def _wait(self, process: Started, url: str, arm: FieldArm) -> None:
        if arm.peerkv:
            wait_until_peerkv_serves(process, url, len(self._engines.urls))
        else:
            wait_until_router_serves(process, url, MODEL, arm.extra_fields())

    def _play(self, arm: FieldArm, url: str, talks: Sequence[Talk], what: str) -> tuple[Player, float]:
        player = Player(url, MODEL, arm.extra_fields())
        wall = asyncio.run(player.play(talks))
        if wrong := [sample.error for sample in player.samples if sample.error]:
            raise ArmFailed(f"{what}: {len(wrong)} of {len(player.samples)} requests failed, the first: {wrong[0]}")
        return player, wall

    def _words(self, seed: str) -> Words:
        return Words(random.Random(seed), NUMBERED if self._given.numbered else COMMON)

    def _warm_up(self) -> list[Talk]:
        """Return prompts of several lengths that share nothing, so that routers that learn have seen some."""
        size: Size = self._given.size
        words = self._words(f"warm {time.time_ns()}")
        lengths = (size.background_tokens, size.prefix_tokens, size.suffix_tokens)
        return [
            Talk(0.3 * i, (Turn(0.0, words.text(lengths[i % len(lengths)]), size.answer_tokens),), chat=i % 2 == 1)
            for i in range(WARM_REQUESTS)
        ]

    def _talks(self, arm: FieldArm, workload: Workload, turn: int) -> list[Talk]:
        shape = random.Random(f"{self._given.seed} {workload.name} {turn}")
        return workload.talks(self._given.size, shape, self._words(f"{self._given.seed} {workload.name} {turn} {arm.name}"))


def _post(url: str, path: str) -> None:
    if path:
        httpx.post(url + path, timeout=ARM_SECONDS_MAX).raise_for_status()


def measure(given: argparse.Namespace, console: Console, figures: list[Figures], failed: list[str]) -> None:
    """Run all rounds, reversing the order of the arms in every second one. Figures and failures go into the lists."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-", dir="/tmp")))
        model = given.model or str(write_chat_model(directory / "model"))
        engines = Engines(directory, model, given.vllm_args, MODEL)
        stack.callback(engines.end)
        with console.status("starting the replicas"):
            engines.wait()
        if given.turns is not None:
            with console.status("waiting for other benches"):
                fcntl.flock(stack.enter_context(given.turns.open("a")), fcntl.LOCK_EX)
        field = Field(given, engines, directory)
        columns = (TextColumn("{task.description:52}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=given.rounds * len(given.arms) * len(given.workloads))
            for turn in range(given.rounds):
                for workload in given.workloads:
                    for arm in given.arms if turn % 2 == 0 else reversed(given.arms):
                        if workload.then and not arm.peerkv:
                            continue
                        progress.update(bar, description=f"round {turn + 1}, {workload.name}: {arm.name}")
                        try:
                            figures.append(field.run(arm, workload, turn))
                            console.print(figures[-1].line(), highlight=False, markup=False, soft_wrap=True)
                        except (StartFailed, ArmFailed, httpx.HTTPError, OSError) as error:
                            failed.append(f"round {turn + 1}, {workload.name}: {arm.name}: {error}")
                            console.print(failed[-1], highlight=False, markup=False, soft_wrap=True, style="red")
                        progress.advance(bar)
                        _save(given, figures, failed)


def _save(given: argparse.Namespace, figures: Sequence[Figures], failed: Sequence[str]) -> None:
    if given.json is not None:
        given.json.write_text(json.dumps(as_json(figures, failed, about(given)), indent=1) + "\n")


def main() -> int:
    """Measure and print; status 1 if something failed."""
    given = parse()
    console = Console(width=150, stderr=True)
    if given.show is not None:
        shown, where = from_json(json.loads(given.show.read_text()))
        print(markdown(shown, shown[0].arm, where))
        return 0
    if given.install:
        install(given.venv, console)
    end_on_sigterm()
    runs = given.rounds * len(given.arms) * len(given.workloads)
    console.print(
        f"{runs} runs of {given.size.seconds:g} s and what is around them: about {runs * given.run_seconds / 60:.0f} min"
    )
    given.size = replace(given.size, cache_tokens=given.cache_tokens)
    figures: list[Figures] = []
    failed: list[str] = []
    try:
        measure(given, console, figures, failed)
    except (StartFailed, httpx.HTTPError) as error:
        failed.append(str(error))
        console.print(f"field: {error}", highlight=False, markup=False)
    except KeyboardInterrupt:
        failed.append("stopped")
    print(markdown(figures, given.arms[0].name, about(given)))
    return 1 if failed else 0
