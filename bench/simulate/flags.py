"""The simulator's command line."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.simulate.policies import FIELD_POLICIES
from bench.simulate.profiles import PROFILES
from bench.simulate.runs import OWN_POLICIES
from bench.simulate.workloads import WORKLOADS

REPLICAS_MAX = 4096

_DESCRIPTION = "Play requests against a simulated fleet, once with each policy."
_EPILOG = """Traces: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces. Fleets of more than 8 replicas get one copy
of the trace's users for every 8 replicas unless --copies says otherwise. The costs of engines and links
are in bench/simulate/profiles.py."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m bench.simulate`."""
    names = [*FIELD_POLICIES, *OWN_POLICIES]
    flags = argparse.ArgumentParser(prog="python -m bench.simulate", description=_DESCRIPTION, epilog=_EPILOG)
    flags.add_argument(
        "trace", nargs="?", type=Path, help="a file in Mooncake's format; without it, conversations are generated"
    )
    flags.add_argument(
        "--workload",
        choices=WORKLOADS,
        default="",
        help="generated instead of a trace: caches too small, 1 request/s, 300 in total",
    )
    flags.add_argument("--replicas", type=integers, default=[8], metavar="N,…", help="fleet sizes (default: 8)")
    flags.add_argument(
        "--rates", type=positives, default=[1.0], metavar="X,…", help="multiples of the trace's own rate (default: 1)"
    )
    flags.add_argument(
        "--copies", type=int, help="groups of users, each with its own prompts, that play the trace concurrently"
    )
    flags.add_argument("--requests", type=int, help="use only this many of the trace's requests")
    flags.add_argument("--policies", type=one_of(names), default=names, metavar="NAME,…", help=", ".join(names))
    flags.add_argument("--profile", choices=list(PROFILES), default=next(iter(PROFILES)), help="costs of engines and links")
    flags.add_argument(
        "--profile-file", type=Path, metavar="FILE", help='JSON: {"engine": {…}, "links": {…}} overrides some of them'
    )
    flags.add_argument("--seed", type=int, default=0, metavar="N")
    flags.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1; with more, µs per decision is misleading)"
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    flags.add_argument("--plot", type=Path, metavar="FILE", help="write an SVG chart of p90 over the rate to FILE")
    return flags


def integers(text: str) -> list[int]:
    """Parse fleet sizes. Raises ArgumentTypeError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error
    if not all(0 < number <= REPLICAS_MAX for number in found):
        raise argparse.ArgumentTypeError(f"{text}: from 1 to {REPLICAS_MAX}")
    return found


def positives(text: str) -> list[float]:
    """Parse rates. Raises ArgumentTypeError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers") from error
    if not all(number > 0 for number in found):
        raise argparse.ArgumentTypeError(f"{text}: above 0")
    return found


def one_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a reader of lists of these names, which raises ArgumentTypeError."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return read
