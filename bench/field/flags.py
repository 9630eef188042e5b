"""The flags of bench.field, and the sizes that fit two CPU cores or two H200s."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from bench.field.arms import ARMS, CPU_ARMS, GPU_ARMS
from bench.simulate.workloads import CPU_SHAPE, GPU_SHAPE, WorkloadShape
from bench.workloads import WORKLOADS, Size
from tests.gpu.replica import write_model

OVERHEAD_SECONDS = 10.0
"""Time around a run: the arm's start, the warm-up, the last answers."""
SPECIALS = 10
NUMBERED = tuple(f"w{number}" for number in range(20, 128_000))
"""The vocabulary of tests.gpu.replica.write_model."""


def _size(shape: WorkloadShape, rate: float, seconds: float, think_seconds: float) -> Size:
    return Size(
        rate=rate,
        seconds=seconds,
        prefix_tokens=shape.prefix_tokens,
        suffix_tokens=shape.suffix_tokens,
        answer_tokens=shape.answer_tokens,
        background_tokens=shape.background_tokens,
        turn_tokens=shape.turn_tokens,
        think_seconds=think_seconds,
        cache_tokens=shape.cache_tokens,
    )


CPU_SIZE = _size(CPU_SHAPE, rate=1.8, seconds=35.0, think_seconds=2.0)
GPU_SIZE = _size(GPU_SHAPE, rate=6.0, seconds=15.0, think_seconds=1.0)
CPU_VLLM = f"--num-gpu-blocks-override {CPU_SHAPE.cache_tokens // CPU_SHAPE.block_tokens} --max-model-len 2048"
GPU_VLLM = (
    f"--load-format dummy --block-size {GPU_SHAPE.block_tokens} "
    f"--num-gpu-blocks-override {GPU_SHAPE.cache_tokens // GPU_SHAPE.block_tokens} "
    "--max-model-len 65536 --max-num-batched-tokens 8192"
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the flags, with `size`, `arms`, `workloads`, `vllm_args` and `cache_tokens` filled in for the kind of engine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peerkv"
    about = "Two vLLM replicas behind peerkv and behind other routers, in one run."
    parser = argparse.ArgumentParser(prog="bench.field", description=about, allow_abbrev=False)
    parser.add_argument(
        "--engines", choices=("cpu", "gpu"), default="cpu", help="cpu: the default model; gpu: 8B shape, dummy weights"
    )
    parser.add_argument("--model", default="", help="model directory (default: peerkv's default model; gpu: a generated one)")
    parser.add_argument("--numbered", action="store_true", help="the model's words are w0, w1, … (default: if it is generated)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; each arm runs once per round (default: 3)")
    parser.add_argument("--arms", help=f"comma-separated list of: {', '.join(arm.name for arm in ARMS)}")
    parser.add_argument(
        "--workloads", help=f"comma-separated list of: {', '.join(each.name for each in WORKLOADS)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of arrival times and shapes (default: 1)")
    parser.add_argument("--vllm-args", help=f"arguments for each replica (default cpu: {CPU_VLLM}; gpu: {GPU_VLLM})")
    parser.add_argument("--venv", type=Path, default=cache / "bench-routers", help="virtual environment of the other routers")
    parser.add_argument("--install", action="store_true", help="create that environment first")
    parser.add_argument(
        "--turns", type=Path, metavar="FILE", help="begin when no other bench (tests.gpu.bench) that was given FILE measures"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE after each run")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, print the tables of such a FILE")
    for field in fields(Size):
        flag = "--" + field.name.replace("_", "-")
        values = f"cpu: {getattr(CPU_SIZE, field.name):g}; gpu: {getattr(GPU_SIZE, field.name):g}"
        parser.add_argument(flag, type=float if "rate" in flag or "seconds" in flag else int, help=f"default {values}")
    given = parser.parse_args(arguments)
    try:
        return _filled(given)
    except KeyError as error:
        parser.error(f"there is no {error.args[0]!r}")


def _filled(given: argparse.Namespace) -> argparse.Namespace:
    gpu = given.engines == "gpu"
    base = GPU_SIZE if gpu else CPU_SIZE
    asked = {field.name: value for field in fields(Size) if (value := getattr(given, field.name)) is not None}
    given.size = replace(base, **asked)
    given.cache_tokens = given.size.cache_tokens
    given.vllm_args = shlex.split(given.vllm_args if given.vllm_args is not None else GPU_VLLM if gpu else CPU_VLLM)
    given.arms = _chosen(given.arms, ARMS) if given.arms else list(GPU_ARMS if gpu else CPU_ARMS)
    given.workloads = _chosen(given.workloads, WORKLOADS) if given.workloads else list(WORKLOADS)
    given.numbered = given.numbered or (gpu and not given.model)
    given.model = given.model or ("" if gpu or given.show else default_model())
    given.run_seconds = given.size.seconds + OVERHEAD_SECONDS
    return given


def _chosen(text: str, known: Sequence[Any]) -> list[Any]:
    by_name = {each.name: each for each in known}
    return [by_name[name.strip()] for name in text.split(",")]


def default_model() -> str:
    """Return the directory of peerkv's default model, downloading it if needed. Raises CalledProcessError."""
    made = subprocess.run([sys.executable, "-m", "engine.default_model"], stdout=subprocess.PIPE, text=True, check=True)
    return made.stdout.split("\n")[-2]


def write_chat_model(folder: Path) -> Path:
    """Write the 8B shape of the GPU tests, with a chat template and with special tokens that are not the beginning of a word.

    Otherwise a special token w2 would cut w20 in two, in some tokenizers and not in others.
    """
    write_model(folder)
    names = {f"w{number}": f"<{number}>" for number in range(SPECIALS)}
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] = {names.get(word, word): number for word, number in tokenizer["model"]["vocab"].items()}
    tokenizer["model"]["unk_token"] = names["w0"]
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %} w10 {{ m['content'] }} w11 {% endfor %} w12 "
    changed = {"chat_template": template, "unk_token": names["w0"], "eos_token": names["w2"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return folder
