"""Copies while their owner rewrites its blocks, or dies."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.engine_pair import Bench
from tests.gpu.races import race
from tests.gpu.replica import Replica, prompt, write_model

THIN = {"hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 128256}


def races_dir(bench: Bench) -> Path:
    return bench.tables.with_name(bench.tables.name + "-races")


def races(bench: Bench) -> None:
    """Imports from an owner that rewrites its blocks all the time, every accepted block checked byte by byte."""
    devices = tuple(f"cuda:{device}" if device else "cpu" for device in bench.scale.devices)
    assert len(devices) == 2
    outcome = race(devices, races_dir(bench), bench.scale.race_imports, 90)
    bench.row("races", **vars(outcome))


def churned(bench: Bench) -> None:
    """Imports into an engine from an engine whose cache is far too small, so that it reallocates blocks all the time.

    The copies are slowed down, so that blocks are reallocated under some of them.
    """
    size = min(2048, bench.scale.churn)
    tight = {"num_gpu_blocks_override": 520, "max_model_len": 4096}
    with bench.pair(tight, {"programs": bench.scale.programs}) as (a, b):
        prompts = [prompt(size, 91 * n + 13) for n in range(12)]
        wanted = [b.ask(ids, 1, logprobs=True, source="") for ids in prompts]
        control = _distance(wanted[1].logprobs, wanted[0].logprobs)
        a.churn(size, True)
        rng = random.Random(3)
        before, worst, began = bench.counters(), 0.0, time.monotonic()
        while bench.counters()["imports"] - before["imports"] < bench.scale.churned_imports and time.monotonic() - began < 120:
            n = rng.randrange(len(prompts))
            a.ask(prompts[n])
            for _ in range(5):
                b.clear()
                answer = b.ask(prompts[n], 1, logprobs=True, source="replica-0")
                worst = max(worst, _distance(answer.logprobs, wanted[n].logprobs))
        after = bench.counters()
        delta = {k: after[k] - before[k] for k in ("imports", "import_blocks", "check_failures", "fallbacks")}
        bench.row("churned", **delta, worst_logprob_distance=worst, distance_of_another_prompt=control)


def _distance(one: list[list[tuple[int, float]]], other: list[list[tuple[int, float]]]) -> float:
    """Return the largest difference of log-probabilities over the tokens that both name; 99 if they share none."""
    ours, theirs = dict(one[0]), dict(other[0])
    shared = ours.keys() & theirs.keys()
    return max((abs(ours[t] - theirs[t]) for t in shared), default=99.0)


def kills(bench: Bench) -> None:
    """SIGKILL of the owner in the middle of a copy, again and again; the copy is slowed down so that the kill lands in it."""
    scale = bench.scale
    thin = write_model(scale.model.with_name("thin"), **(THIN if scale.devices[0] else {}), **_layers(scale.model))
    space: dict[str, Any] = {"max_model_len": 4096}
    if scale.devices[0]:
        space = {"kv_cache_memory_bytes": 6 << 30, "gpu_memory_utilization": 0.15}
    base = scale.arguments | space
    b = Replica("replica-1", scale.devices[1], thin, bench.tables, programs=scale.programs, **base).ready()
    waiting = [_owner(bench, thin, n, base) for n in range(2)]
    try:
        ids = prompt(scale.pull, 4711)
        cold = b.ask(ids, 8, logprobs=True, source="")
        used = killed = landed = right = 0
        for n in range(scale.kills):
            owner = waiting.pop(0).ready()
            owner.ask(ids)
            b.clear()
            used = max(used, _used(scale.devices[0]))
            before = bench.counters()
            b.begin(ids, 8, logprobs=True, source=owner.name)
            time.sleep(0.06)
            owner.kill()
            answer = b.end()
            after = bench.counters()
            killed += 1
            landed += after["fallbacks"] - before["fallbacks"]
            right += answer.tokens == cold.tokens and answer.logprobs == cold.logprobs
            if n + 2 < scale.kills:
                waiting.append(_owner(bench, thin, n + 2, base))
        time.sleep(2.0)
        left = _used(scale.devices[0])
        bench.row("kills", killed=killed, in_the_middle=landed, right_answers=right, importer_lives=b.process.is_alive(),
                  owners_gpu_mib=used, owners_gpu_mib_after=left)  # fmt: skip
    finally:
        b.stop()
        for owner in waiting:
            owner.kill()


def _layers(model: Path) -> dict[str, int]:
    return {"num_hidden_layers": json.loads((model / "config.json").read_text())["num_hidden_layers"]}


def _owner(bench: Bench, model: Path, number: int, base: dict[str, Any]) -> Replica:
    return Replica(f"owner-{number}", bench.scale.devices[0], model, bench.tables, **base)


def _used(device: str) -> int:
    if not device:
        return 0
    program = "import torch; free, total = torch.cuda.mem_get_info(); print((total - free) >> 20)"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    return int(done.stdout)
