"""The flags of bench.pools, with sizes that fit two CPU cores, or one or more H200s."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from bench.field.flags import default_model
from bench.pools.arms import ARMS, USUAL, PoolArm

ABOUT = """One pool of host memory that all replicas restore from, beside private pools of the same total, in one run.

The same engines serve every arm. Where pools are private, a replica restores from its own region of the memory alone: its
connector is told at each look-up how far it reaches, the gateway leaves the rest out, and the engines' counters must confirm
it. "No imports": not from other replicas' KV caches either. "In turn": without peerkv's steering.
A round plays every arm: all memories are emptied, each prefix is asked for --passes times, then rates are tried in an open loop
until the 90th percentile of the time to the first token crosses the bound, --cold-factor times what an idle replica takes to
compute such a prompt. Arms of a round get the same moments and prefixes, in other words."""
EXAMPLES = """on one H200, four replicas (some 9 minutes; what is measured is in FILE even if it is cut short):
  python -m bench.pools --engines gpu --replicas 4 --replicas-per-gpu 4 --json FILE
on two H200s, a replica each:
  python -m bench.pools --engines gpu --replicas 2 --json FILE
the tables of a FILE:
  python -m bench.pools --show FILE"""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What has a default for each kind of engine. Lengths are in tokens, rates in requests per second."""

    replicas: int
    prefix_tokens: int
    suffix_tokens: int
    answer_tokens: int
    rate: float
    seconds: float
    steps: int
    passes: int
    rounds: int


CPU = Numbers(2, 480, 32, 6, rate=4.0, seconds=15.0, steps=5, passes=2, rounds=3)
GPU = Numbers(4, 8_000, 200, 16, rate=8.0, seconds=7.0, steps=6, passes=2, rounds=2)
CPU_VLLM = "--num-gpu-blocks-override 96 --max-model-len 2048"
GPU_VLLM = (
    "--load-format dummy --block-size 16 --num-gpu-blocks-override 2048 --max-model-len 16384 --max-num-batched-tokens 8192 "
    """--compilation-config '{"mode":0,"cudagraph_mode":"FULL_DECODE_ONLY"}'"""
)
CPU_HOST_MEMORY, GPU_HOST_MEMORY = "512MiB", "48GiB"
_HELP = {
    "replicas": "replicas, each with a KV cache of its own",
    "prefix_tokens": "tokens of a prefix",
    "suffix_tokens": "tokens of a question behind it",
    "answer_tokens": "tokens of an answer",
    "rate": "the first rate that is tried, requests per second",
    "seconds": "length of a step",
    "steps": "rates that are tried at most",
    "passes": "how often each prefix is asked for before",
    "rounds": "rounds; each arm runs once per round",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags, with `numbers`, `arms`, `vllm_args` and `host_memory` filled in for the kind of engine."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="bench.pools", description=ABOUT, epilog=EXAMPLES, formatter_class=plain, allow_abbrev=False
    )
    parser.add_argument("--engines", choices=("cpu", "gpu"), default="cpu", help="gpu: 8B shape, dummy weights")
    parser.add_argument("--model", default="", metavar="DIR", help="model (default: the default model; gpu: a generated one)")
    parser.add_argument("--numbered", action="store_true", help="the model's words are w0, w1, … (default: if it is generated)")
    parser.add_argument("--replicas-per-gpu", type=int, default=1, metavar="N", help="replicas that share a GPU (default: 1)")
    parser.add_argument(
        "--host-memory", metavar="SIZE", help=f"of all replicas together (default: {CPU_HOST_MEMORY}; gpu: {GPU_HOST_MEMORY})"
    )
    arms = "; ".join(arm.name for arm in ARMS)
    parser.add_argument("--arms", metavar="NAMES", help=f"some of: {arms}; with ; between them (default: the first four)")
    parser.add_argument("--pool-share", type=float, default=0.8, metavar="X", help="prefixes' part of the pool (default: 0.8)")
    parser.add_argument(
        "--zipf", type=float, default=1.0, metavar="X", help="how uneven their use is, an exponent (default: 1)"
    )
    parser.add_argument("--growth", type=float, default=1.4, metavar="X", help="factor between two rates (default: 1.4)")
    parser.add_argument("--cold-factor", type=float, default=2.0, metavar="X", help="the bound, in cold prompts (default: 2)")
    parser.add_argument("--bound", type=float, default=0.0, metavar="SECONDS", help="the bound, in place of --cold-factor")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="seed of moments and choices (default: 1)")
    parser.add_argument("--vllm-args", metavar="ARGS", help=f"for each replica (default: {CPU_VLLM}; gpu: {GPU_VLLM})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE after each run")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the table of such a FILE")
    for field in fields(Numbers):
        default = f"(default: {getattr(CPU, field.name):g}; gpu: {getattr(GPU, field.name):g})"
        kind = float if field.name in ("rate", "seconds") else int
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar="N", help=f"{_HELP[field.name]} {default}")
    given = parser.parse_args(arguments)
    try:
        given.arms = _chosen(given.arms) if given.arms else list(USUAL)
    except KeyError as error:
        parser.error(f"there is no arm {error.args[0]!r}")
    return _filled(given)


def _chosen(text: str) -> list[PoolArm]:
    by_name = {arm.name: arm for arm in ARMS}
    return [by_name[name.strip()] for name in text.split(";")]


def _filled(given: argparse.Namespace) -> argparse.Namespace:
    gpu = given.engines == "gpu"
    base = GPU if gpu else CPU
    asked = {field.name: getattr(given, field.name) for field in fields(Numbers)}
    given.numbers = Numbers(**{name: getattr(base, name) if value is None else value for name, value in asked.items()})
    given.host_memory = given.host_memory or (GPU_HOST_MEMORY if gpu else CPU_HOST_MEMORY)
    given.vllm_args = shlex.split(given.vllm_args if given.vllm_args is not None else GPU_VLLM if gpu else CPU_VLLM)
    given.numbered = given.numbered or (gpu and not given.model)
    given.model = given.model or ("" if gpu or given.show else default_model())
    return given
