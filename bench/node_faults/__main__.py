"""`python -m bench.node_faults --faults 10000`: imports between two nodes, each with a fault; every block is compared.

Real agents, tables, memory and TLS on loopback, and an engine's worker that imports; vLLM alone is missing. Faults are chosen
at random among all kinds, those that take long less often. Deadlines are a tenth of what they are in use. A block is wrong if
the worker does not report it as failed (vLLM would use it) and it has other bytes than its key stands for; a block is touched
if it changed although no import was into it. Ends with 1 if there is either, or an import that hangs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.node_faults.faults import SLOW, WITH_TLS, WITHOUT_TLS, Fault
from bench.node_faults.rig import BLOCK_TOKENS, Imported, Rig, rig

WITHOUT_TLS_SHARE = 0.15


@dataclass
class Tally:
    """What became of imports with a kind of fault."""

    faults: int = 0
    hit: int = 0
    missed: int = 0
    good_blocks: int = 0
    computed_blocks: int = 0
    wrong_blocks: int = 0
    touched_blocks: int = 0
    hung: int = 0
    seconds_max: float = 0.0

    def add(self, imported: Imported, hit: bool) -> None:
        """Count an import."""
        failed = imported.failed
        self.faults += 1
        self.hit += hit
        self.missed += failed > 0
        self.good_blocks += len(imported.numbers) - failed
        self.computed_blocks += failed
        self.wrong_blocks += imported.wrong
        self.touched_blocks += imported.late
        self.hung += imported.report is None
        self.seconds_max = max(self.seconds_max, imported.seconds)

    def row(self, name: str) -> str:
        """A line of the table in BENCHMARKS.md."""
        cells = (
            name, self.faults, self.hit, self.missed, self.good_blocks, self.computed_blocks, self.wrong_blocks,
            self.touched_blocks, self.hung, f"{self.seconds_max:.2f}",
        )  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


HEADER = (
    "| fault | imports | hit | imports with a miss | good blocks | computed | wrong | touched | hung | longest, s |\n"
    + "|---" * 10
    + "|"
)


def inject(made: Rig, fault: Fault) -> tuple[Imported, bool]:
    """Import once, with a fault; return how it went and whether the fault did something."""
    made.settle()
    job, numbers = made.job()
    with fault(made, job) as injected:
        begun = time.monotonic()
        made.begin(job)
        injected.meanwhile()
        imported = made.end(job, numbers, begun)
        hit = injected.hit()
    return imported, hit


def run(faults: int, kinds: dict[str, Fault], random: Random, keys: bool, told: Callable[[int], None]) -> dict[str, Tally]:
    """Inject so many faults: each kind once, and then any."""
    tallies = {name: Tally() for name in kinds}
    names = list(kinds)
    weights = [SLOW.get(name, 1.0) for name in names]
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="peerkv-bench-") as folder, rig(Path(folder), random, keys) as made:
        for number in range(faults):
            name = names[number] if number < len(names) else random.choices(names, weights)[0]
            tallies[name].add(*inject(made, kinds[name]))
            told(number + 1)
    return tallies


def total(tallies: dict[str, Tally]) -> Tally:
    """All kinds together."""
    summed = Tally()
    for tally in tallies.values():
        for name, value in vars(tally).items():
            known = getattr(summed, name)
            setattr(summed, name, max(known, value) if name == "seconds_max" else known + value)
    return summed


def chaos(faults: int, seed: int, told: Callable[[int], None] = lambda _: None) -> dict[str, Tally]:
    """Inject so many faults, a part of them on a wire without TLS."""
    random = Random(seed)
    without = max(len(WITHOUT_TLS), int(faults * WITHOUT_TLS_SHARE))
    tallies = run(without, WITHOUT_TLS, random, False, told)
    return tallies | run(faults - without, WITH_TLS, random, True, lambda done: told(done + without))


def main() -> None:
    """Read the arguments and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.node_faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    begun = time.monotonic()

    def told(done: int) -> None:
        if done % 500 == 0:
            print(f"{done} of {given.faults}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    tallies = chaos(given.faults, given.seed, told)
    print(HEADER)
    for name, tally in tallies.items():
        print(tally.row(name))
    summed = total(tallies)
    print(summed.row("all"))
    print(
        f"seed {given.seed}, {time.monotonic() - begun:.0f} s: {summed.faults} faults,"
        f" {summed.good_blocks * BLOCK_TOKENS} tokens taken for good, {summed.wrong_blocks * BLOCK_TOKENS} of them wrong"
    )
    sys.exit(1 if summed.wrong_blocks or summed.touched_blocks or summed.hung else 0)


if __name__ == "__main__":
    main()
