"""The peer read on two real GPUs, without an engine: an owner that rewrites its blocks under the reader all the time.

Every word of a block carries the number of the key it is offered under, so each accepted block can be checked whole. Also the
script for compute-sanitizer: `compute-sanitizer python -m tests.gpu.races --imports 200`.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.transport.table_fixtures import writer
from transport.backends.base import ImportJob
from transport.keys import chain_keys, root_key
from transport.table.directory import TableDirectory

LAYERS, BLOCKS, WORDS, KEYS = 8, 256, 8192, 64
CHAIN = chain_keys(root_key(b"f" * 16), range(KEYS * 4), 4)


@dataclass
class Outcome:
    imports: int = 0
    accepted_blocks: int = 0
    wrong_blocks: int = 0
    check_failures: int = 0
    wrong_unchecked: int = 0
    """Blocks that failed the check and whose bytes were indeed wrong: what the check is there for."""


def memory(device: str) -> dict[str, Any]:
    import torch

    return {f"layer.{i}": torch.zeros(BLOCKS, WORDS, dtype=torch.int64, device=device) for i in range(LAYERS)}


def _owner(device: str, path: str, pipe: Connection, seed: int) -> None:
    import torch

    from engine.connector.worker import _transport

    caches = memory(device)
    transport = _transport(caches, BLOCKS, 0)
    rng = random.Random(seed)
    with contextlib.closing(
        writer(Path(path), "owner", BLOCKS, transport=transport.name, memories=(transport.memory(),))
    ) as table:
        held: dict[int, int] = {}
        for key in range(KEYS):
            _write(caches, key, key)
            held[key] = key
        _settle(torch, device)
        table.publish(list(held.values()), CHAIN[list(held)])
        pipe.send("ready")
        while not pipe.poll(0):
            key = rng.randrange(KEYS)
            old = held[key]
            # the old block is given to another key, as an engine does: withdraw, write, offer
            thief = rng.randrange(KEYS)
            spare = held[thief]
            table.invalidate([old, spare])
            _write(caches, old, thief)
            _write(caches, spare, key)
            _settle(torch, device)
            table.publish([old, spare], CHAIN[[thief, key]])
            held[thief], held[key] = old, spare
            time.sleep(rng.random() * 0.0005)


def _write(caches: dict[str, Any], block: int, key: int) -> None:
    for layer, tensor in enumerate(caches.values()):
        tensor[block].fill_(key * 100 + layer)


def _settle(torch: Any, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def race(devices: tuple[str, str], path: Path, imports: int, seconds: float, seed: int = 1) -> Outcome:
    """Import random runs from the churning owner and check every accepted block; stops after `seconds` at the latest."""
    import torch

    from engine.connector.worker import _transport

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=_owner, args=(devices[0], str(path), theirs, seed), daemon=True)
    owner.start()
    outcome = Outcome()
    try:
        assert ours.poll(120)
        assert ours.recv() == "ready"
        if devices[1].startswith("cuda"):
            torch.cuda.set_device(devices[1])
        caches = memory(devices[1])
        importer = _transport(caches, BLOCKS, 0)
        reader = TableDirectory(path).tables()["owner"]
        rng = random.Random(seed + 1)
        deadline = time.monotonic() + seconds
        while outcome.imports < imports and time.monotonic() < deadline:
            _one(importer, reader, caches, rng, outcome)
        importer.close()
    finally:
        with contextlib.suppress(OSError):
            ours.send("stop")
        owner.join(10)
        if owner.is_alive():
            owner.kill()
    return outcome


def _one(importer: Any, reader: Any, caches: dict[str, Any], rng: random.Random, outcome: Outcome) -> None:
    first = rng.randrange(KEYS - 1)
    run = reader.longest_run(CHAIN[first : first + rng.randrange(1, KEYS - first + 1)])
    if not len(run):
        return
    targets = np.array(rng.sample(range(BLOCKS), len(run)), np.int32)
    job = ImportJob("r", "owner", reader.epoch, run.block_ids, run.states, targets)
    importer.start(job, reader, gently=rng.random() < 0.5)
    results: list[Any] = []
    until = time.monotonic() + 20
    while not results and time.monotonic() < until:
        results = importer.poll()
    failed = set(results[0].failed_blocks)
    outcome.imports += 1
    outcome.check_failures += len(failed)
    for place, target in enumerate(targets.tolist()):
        right = all(bool((t[target] == (first + place) * 100 + layer).all()) for layer, t in enumerate(caches.values()))
        if target in failed:
            outcome.wrong_unchecked += not right
        else:
            outcome.accepted_blocks += 1
            outcome.wrong_blocks += not right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imports", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--devices", nargs=2, default=["cuda:0", "cuda:1"])
    given = parser.parse_args()
    path = Path(f"/dev/shm/peerkv-races-{os.getpid()}")
    try:
        print(race(tuple(given.devices), path, given.imports, given.seconds))
    finally:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
