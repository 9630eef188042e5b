"""Memory, descriptors and files while all tiers evict without a pause, for several block sizes: real vLLM on this machine.

One replica, host memory and a disk, each far too small for the prompts that are asked for again and again by four clients.
Printed for each block size: answers, prompt tokens by source, and what all processes, the block tables and the disk hold. It
fails if that grew from the second third to the last, if the disk went over its budget, or if a request failed.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from bench.tiers.restore import WORDS, Served

KV_BYTES, HOST_MEMORY, DISK_BYTES = 48 << 20, "96MiB", 256 << 20
PROMPTS, PROMPT_TOKENS = 100, (200, 900)
CLIENTS = 4
SAMPLE_SECONDS = 2.0
GROWTH_MAX = 0.05
DESCRIPTORS_GROWTH_MAX = 8
DISK_OVER_MAX = 1.1
"""Of its budget: the segment that is being written counts when it is full."""


@dataclass(frozen=True)
class Sample:
    """Of all processes together: resident bytes and descriptors; bytes of block tables; bytes and files on the disk."""

    resident_bytes: int
    descriptors: int
    table_bytes: int
    disk_bytes: int
    disk_files: int


def below(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text().split():
                yield from below(int(child))


def held(served: Served, disk: Path) -> Sample:
    resident = descriptors = 0
    for pid in below(served.pid):
        with suppress(OSError):
            resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    on_disk = sizes(disk)
    return Sample(resident, descriptors, sum(sizes(served.table_dir)), sum(on_disk), len(on_disk))


def sizes(directory: Path) -> list[int]:
    """Of the files there, those left out that are just being removed."""
    found = []
    for path in directory.iterdir():
        with suppress(OSError):
            found.append(path.stat().st_size)
    return found


class Clients:
    """Ask for prompts, those at the front of the list most often, until they are ended."""

    def __init__(self, served: Served, seed: int) -> None:
        chance = random.Random(seed)
        self._served, self._ended = served, threading.Event()
        self._prompts = [
            [chance.randrange(1000, WORDS) for _ in range(chance.randrange(*PROMPT_TOKENS))] for _ in range(PROMPTS)
        ]
        self.got: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._ask, args=(seed + number,)) for number in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._ended.is_set():
            ids = self._prompts[int(PROMPTS * chance.random() ** 2)]
            body = {"prompt": ids[: chance.randrange(len(ids) // 2, len(ids) + 1)], "max_tokens": 4}
            try:
                self._served.client.post("/v1/completions", json=body).raise_for_status()
                self.got["answers"] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted and ends the run as failed
                self.got[f"failed: {error!r}"] += 1

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def growth(samples: Sequence[Sample]) -> list[str]:
    """What is larger in the last third than in the second, in words; the first third fills memories."""
    third, found = len(samples) // 3, []
    for name in (field.name for field in fields(Sample)):
        before, after = (
            median(getattr(each, name) for each in part) for part in (samples[third : 2 * third], samples[2 * third :])
        )
        slack = DESCRIPTORS_GROWTH_MAX if name in ("descriptors", "disk_files") else GROWTH_MAX * before
        if after > before + slack:
            found.append(f"{name.replace('_', ' ')} grew from {before:,.0f} to {after:,.0f}")
    return found


def one(model: str, block_size: int, minutes: float, directory: Path | None) -> list[str]:
    """Run with blocks of so many tokens, print a row, return what is wrong."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-bench-soak-", dir=directory)))
        flags = ["--host-memory", HOST_MEMORY, "--disk", str(home / "disk"), "--disk-bytes", str(DISK_BYTES)]
        vllm_args = ("--block-size", str(block_size), "--max-model-len", "1024")
        served = Served(home, model, flags, kv_bytes=KV_BYTES, dtype="bfloat16", vllm_args=vllm_args)
        stack.callback(served.end)
        served.wait()
        clients = Clients(served, block_size)
        samples = []
        until = time.monotonic() + 60 * minutes
        try:
            while time.monotonic() < until:
                time.sleep(SAMPLE_SECONDS)
                samples.append(held(served, home / "disk"))
        finally:
            clients.end()
        stats = served.client.get("/kv/stats").json()
    tokens, third = stats["totals"]["tokens"], samples[2 * len(samples) // 3 :]
    largest = Sample(*(max(getattr(each, field.name) for each in third) for field in fields(Sample)))
    came = ", ".join(f"{name} {tokens[name]:,}" for name in ("local", "host_memory", "disk", "computed"))
    print(
        f"| {block_size} | {clients.got['answers']:,} | {came} | {largest.resident_bytes >> 20} | {largest.descriptors} "
        f"| {largest.table_bytes / (1 << 20):.1f} | {largest.disk_bytes >> 20}, {largest.disk_files} |",
        flush=True,
    )
    wrong = growth(samples) + [each for each in clients.got if each.startswith("failed")]
    if largest.disk_bytes > DISK_OVER_MAX * DISK_BYTES:
        wrong.append(f"the disk holds {largest.disk_bytes >> 20} MiB of {DISK_BYTES >> 20}")
    wrong += [f"nothing came from {name}" for name in ("host_memory", "disk") if not tokens[name]]
    return [f"blocks of {block_size}: {each}" for each in wrong]


def run(model: str, block_sizes: Sequence[int], minutes: float, directory: Path | None) -> None:
    """Measure, print; exit with 1 if something is wrong."""
    print(f"KV cache {KV_BYTES >> 20} MiB, host memory {HOST_MEMORY}, disk {DISK_BYTES >> 20} MiB; the most in the last third")
    head = ("block", "answers", "prompt tokens", "resident MiB", "descriptors", "tables MiB", "disk MiB, files")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|", flush=True)
    wrong = [each for size in block_sizes for each in one(model, size, minutes / len(block_sizes), directory)]
    print("\n".join(wrong) or "nothing grew")
    if wrong:
        sys.exit(1)
