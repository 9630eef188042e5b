"""What host memory takes of a scheduler's step, which no engine and no copy is needed for: blocks that vLLM reallocates are
taken in, with slots that give way for them, and told of as copied."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.host_process.kept_memory import KeptMemories
from engine.tiers.host_memory import HostMemory
from transport.table.kept_table import KeptTable
from transport.table.layout import Description

SLOTS = 12288
BLOCKS = (32, 256, 2048)
ROUNDS = 9


def run() -> None:
    """Measure and print: of a full tier, milliseconds for so many blocks of a step."""
    print(f"{'blocks':>6} {'take, ms':>24} {'copied, ms':>24}   medians of {ROUNDS} (least to most), {SLOTS} slots, all in use")
    with tempfile.TemporaryDirectory(prefix="peerkv-bench-", dir="/dev/shm") as folder:
        kept = KeptMemories(Path(folder)).keep("bench", 1 << 20)
        description = Description("bench.host-memory", os.getpid(), "xxh3_128", "shared_memory", "ok", {}, ())
        table = KeptTable(Path(folder), description, 16, SLOTS, Path(kept.draft))
        memory = HostMemory(table, ranks=1, elsewhere=lambda keys: np.zeros(len(keys), np.bool_))
        numbers = np.random.default_rng(0)
        while table.valid() < SLOTS:
            _step(memory, numbers, min(2048, SLOTS - table.valid()))
        for blocks in BLOCKS:
            rows = zip(*(_step(memory, numbers, blocks) for _ in range(ROUNDS)), strict=True)
            cells = [f"{statistics.median(each):7.2f} ({min(each):.2f} to {max(each):.2f})" for each in rows]
            print(f"{blocks:6} {cells[0]:>24} {cells[1]:>24}", flush=True)


def _step(memory: HostMemory, numbers: np.random.Generator, count: int) -> tuple[float, float]:
    keys, blocks = numbers.integers(0, 1 << 63, (count, 2), np.uint64), list(range(count))
    memory.asked(keys)
    taken = _ms(lambda: memory.take(blocks, keys, [0] * count, [0] * count))
    copied = {store.slot: 1 for store in memory.take_stores().begun}
    return taken, _ms(lambda: memory.copied(copied))


def _ms(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
