"""Steps of planning by several checkouts in turn, some requests each: `python -m bench.beside --model DIR TREE TREE ...`.

Each tree runs its own `bench.planning` in a process of its own, and only one of them runs at a time: other work on the machine
hits all alike. `TREE:FILE` runs Python code from FILE first, which may take a mechanism out. Figures are microseconds of CPU
time per request: the 20th percentile over the turns, and the median ratio to what the first tree took in the same turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import IO

from bench.planning import CASES, STEPS
from bench.report import quantile

WORKER = """
import json, sys, time
from contextlib import ExitStack
from bench import planning
from bench.cases import Case, bodies

model, name, patch = sys.argv[1:4]
if patch:
    exec(open(patch).read())
service = planning.TokenService(planning.TokenizerSource(model))
if not (state := service.load()).loaded:
    sys.exit(state.reason)
time.perf_counter = time.thread_time  # earlier versions measured by that
name, characters, endpoint = next(case for case in planning.CASES if case[0] == name)
with ExitStack() as stack:
    steps = planning.Steps(stack, service, characters, endpoint)
    source = bodies(Case(name, characters, planning.IN_FLIGHT), "tail", endpoint, 1 << 20)
    for line in sys.stdin:
        steps.seconds = {step: [] for step in planning.STEPS}
        planning.run(steps, source, int(line))
        print(json.dumps([sum(steps.seconds[step]) / int(line) * 1e6 for step in planning.STEPS]), flush=True)
"""
REQUESTS = 32
LONG_REQUESTS = 16
WARM_TURNS = 20

Worker = tuple[IO[str], IO[str]]


def _started(stack: ExitStack, arm: str, model: str, case: str) -> Worker:
    tree, _, patch = arm.partition(":")
    environment = os.environ | {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1"}
    argv = [sys.executable, "-c", WORKER, model, case, patch]
    process = subprocess.Popen(argv, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a worker has no pipes")
    stack.callback(process.stdin.close)
    return process.stdin, process.stdout


def _turn(worker: Worker, requests: int) -> list[float]:
    """Return the microseconds of each step. Raises RuntimeError when the worker ended."""
    told, answers = worker
    told.write(f"{requests}\n")
    told.flush()
    line = answers.readline()
    if not line:
        raise RuntimeError("a worker ended; what it said is above")
    figures: list[float] = json.loads(line)
    return figures


def measure(trees: list[str], model: str, case: str, requests: int, turns: int) -> list[list[list[float]]]:
    """Return the microseconds of each step, by tree and turn; the order of the trees is turned around in every second turn."""
    with ExitStack() as stack:
        workers = [_started(stack, tree, model, case) for tree in trees]
        for worker in workers:
            for _ in range(WARM_TURNS):
                _turn(worker, requests)
        found: list[list[list[float]]] = [[] for _ in workers]
        for turn in range(turns):
            order = range(len(workers))
            for place in order if turn % 2 == 0 else reversed(order):
                found[place].append(_turn(workers[place], requests))
    return found


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="bench.beside", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("trees", nargs="+", metavar="TREE", help="a checkout, or TREE:FILE with code to run first")
    parser.add_argument("--model", required=True, help="directory with the tokenizer")
    parser.add_argument("--turns", type=int, default=150, help="of 32 requests, 16 if they are long (default: 150)")
    names = ", ".join(name for name, _, _ in CASES)
    parser.add_argument("--cases", default="", help=f"with commas between, of: {names} (default: all)")
    given = parser.parse_args()
    print(f"| prompt | tree | {' | '.join(STEPS)} | in all | to the first |\n|{'---|' * (len(STEPS) + 4)}")
    for name, characters, _ in CASES:
        if given.cases and name not in given.cases.split(","):
            continue
        requests = REQUESTS if characters < 100_000 else LONG_REQUESTS
        found = measure(given.trees, given.model, name, requests, given.turns)
        for tree, figures in zip(given.trees, found, strict=True):
            steps = [quantile([each[step] for each in figures], 0.2) for step in range(len(STEPS))]
            ratio = median([sum(ours) / sum(first) for ours, first in zip(figures, found[0], strict=True)])
            shown = " | ".join(f"{each:.0f}" for each in [*steps, quantile([sum(each) for each in figures], 0.2)])
            print(f"| {name} | {Path(tree).name} | {shown} | {ratio:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
