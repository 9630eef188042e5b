"""Starts the engines of bench.pools, runs its arms in turn, prints and saves what came of it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from bench.engines import Engines
from bench.field.flags import write_chat_model
from bench.field.report import where_and_when
from bench.machine import StartFailed, end_on_sigterm
from bench.pools import reach
from bench.pools.arms import SHARED
from bench.pools.flags import parse
from bench.pools.report import PoolRun, as_json, from_json, markdown
from bench.pools.runs import MODEL, Pools, RunFailed


def measure(given: argparse.Namespace, console: Console, runs: list[PoolRun], failed: list[str]) -> dict[str, Any]:
    """Run all rounds, reversing the order of the arms in every second one; return what they are about."""
    about = where_and_when("bench.pools", gpus=given.engines == "gpu")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-", dir="/tmp")))
        where = directory / "reach"
        reach.write(where, reach.Reach.POOL)
        with console.status("starting the replicas"):
            engines = _engines(given, directory, where)
            stack.callback(engines.end)
            engines.wait()
        pools = Pools(given, engines, where, directory)
        about |= {"workload": _workload(given, pools), "numbers": asdict(given.numbers), "vllm_args": given.vllm_args}
        console.print(about["workload"], highlight=False, markup=False, soft_wrap=True)
        for turn in range(given.numbers.rounds):
            for arm in given.arms if turn % 2 == 0 else reversed(given.arms):
                try:
                    with console.status(f"round {turn + 1}: {arm.name}"):
                        runs.append(pools.run(arm, turn))
                    console.print(runs[-1].line(), highlight=False, markup=False, soft_wrap=True)
                except (StartFailed, RunFailed, httpx.HTTPError, OSError) as error:
                    failed.append(f"round {turn + 1}: {arm.name}: {error}")
                    console.print(failed[-1], highlight=False, markup=False, soft_wrap=True, style="red")
                if given.json is not None:
                    given.json.write_text(json.dumps(as_json(runs, failed, about), indent=1) + "\n")
    return about


def _engines(given: argparse.Namespace, directory: Path, where: Path) -> Engines:
    flags = ["--host-memory", given.host_memory, "--replicas-per-gpu", str(given.replicas_per_gpu)]
    return Engines(
        directory,
        given.model or str(write_chat_model(directory / "model")),
        given.vllm_args,
        MODEL,
        replicas=given.numbers.replicas,
        flags=flags,
        launcher="bench.pools.server",
        env={reach.VARIABLE: str(where)},
    )


def _workload(given: argparse.Namespace, pools: Pools) -> str:
    numbers = given.numbers
    bound = f"{pools.bound:.2f} s" + ("" if given.bound else f" ({given.cold_factor:g} times a cold prompt's)")
    return (
        f"{numbers.replicas} replicas, host memory for {pools.pool_tokens:,} tokens; {pools.prefixes} prefixes of "
        f"{numbers.prefix_tokens:,} tokens (Zipf, exponent {given.zipf:g}), questions of {numbers.suffix_tokens}, answers of "
        f"{numbers.answer_tokens}; bound of the first token's p90: {bound}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; status 1 if something failed."""
    given = parse(arguments)
    if given.show is not None:
        shown, about = from_json(json.loads(given.show.read_text()))
        print(markdown(shown, SHARED.name, about))
        return 0
    console = Console(width=150, stderr=True)
    end_on_sigterm()
    runs: list[PoolRun] = []
    failed: list[str] = []
    try:
        about = measure(given, console, runs, failed)
    except (StartFailed, RunFailed, httpx.HTTPError) as error:
        console.print(f"pools: {error}", highlight=False, markup=False)
        return 1
    print(markdown(runs, SHARED.name, about))
    return 1 if failed else 0
