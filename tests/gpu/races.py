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
from transport.groups import Group, needed
from transport.keys import Keys, chain_keys, group_keys, root_key
from transport.table.directory import TableDirectory
from transport.table.group_look_up import GroupChain, supply

LAYERS, BLOCKS, WORDS, KEYS = 8, 256, 8192, 64
CHAIN = chain_keys(root_key(b"f" * 16), range(KEYS * 4), 4)
ONE = (Group("full", 4),)
SEVERAL = (Group("full", 4), Group("window", 4, 40), Group("state", 4))
"""Three groups, whose layers lie over the same memory."""


@dataclass
class Outcome:
    imports: int = 0
    accepted_blocks: int = 0
    wrong_blocks: int = 0
    check_failures: int = 0
    wrong_unchecked: int = 0
    """Blocks that failed the check and whose bytes were indeed wrong: what the check is there for."""


def memory(device: str, groups: tuple[Group, ...]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the layers of every group and the group of each: a group's layers lie over those of the others."""
    import torch

    own = [torch.zeros(BLOCKS, WORDS, dtype=torch.int64, device=device) for _ in range(LAYERS)]
    layers = {f"{group}.{layer}": tensor for group in range(len(groups)) for layer, tensor in enumerate(own)}
    return layers, {name: int(name.partition(".")[0]) for name in layers}


def _owner(device: str, path: str, pipe: Connection, seed: int, groups: tuple[Group, ...]) -> None:
    import torch

    from engine.connector.worker import _transport

    caches, layers = memory(device, groups)
    transport = _transport(caches, BLOCKS, 0, layers)
    rng = random.Random(seed)
    names = [(group, key) for group in range(len(groups)) for key in range(KEYS)]
    about: dict[str, Any] = {"transport": transport.name, "memories": (transport.memory(),)}
    with contextlib.closing(writer(Path(path), "owner", BLOCKS, **about)) as table:
        held = {name: block for block, name in enumerate(names)}
        for name, block in held.items():
            _write(caches, block, name)
        _settle(torch, device)
        for name, block in held.items():
            table.publish([block], _keys(name))
        pipe.send("ready")
        while not pipe.poll(0):
            name, thief = rng.choice(names), rng.choice(names)
            old, spare = held[name], held[thief]
            # the old block is given to another key, as an engine does: withdraw, write, offer
            table.invalidate([old, spare])
            _write(caches, old, thief)
            _write(caches, spare, name)
            _settle(torch, device)
            table.publish([old], _keys(thief))
            if spare != old:
                table.publish([spare], _keys(name))
            held[thief], held[name] = old, spare
            time.sleep(rng.random() * 0.0005)


def _keys(name: tuple[int, int]) -> Keys:
    group, key = name
    return group_keys(CHAIN[key : key + 1], group)


def _write(caches: dict[str, Any], block: int, name: tuple[int, int]) -> None:
    for layer in range(LAYERS):
        caches[f"0.{layer}"][block].fill_(_content(name, layer))


def _content(name: tuple[int, int], layer: int) -> int:
    group, key = name
    return (group * KEYS + key) * 100 + layer


def _settle(torch: Any, device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def race(
    devices: tuple[str, str], path: Path, imports: int, seconds: float, seed: int = 1, *, several: bool = False
) -> Outcome:
    """Import random runs from the churning owner and check every accepted block; stops after `seconds` at the latest."""
    import torch

    from engine.connector.worker import _transport

    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    groups = SEVERAL if several else ONE
    given = (devices[0], str(path), theirs, seed, groups)
    owner = multiprocessing.get_context("spawn").Process(target=_owner, args=given, daemon=True)
    owner.start()
    outcome = Outcome()
    try:
        assert ours.poll(120)
        assert ours.recv() == "ready"
        if devices[1].startswith("cuda"):
            torch.cuda.set_device(devices[1])
        caches, layers = memory(devices[1], groups)
        importer = _transport(caches, BLOCKS, 0, layers)
        reader = TableDirectory(path).tables()["owner"]
        rng = random.Random(seed + 1)
        deadline = time.monotonic() + seconds
        while outcome.imports < imports and time.monotonic() < deadline:
            _one(importer, reader, caches, rng, outcome, groups)
        importer.close()
    finally:
        with contextlib.suppress(OSError):
            ours.send("stop")
        owner.join(10)
        if owner.is_alive():
            owner.kill()
    return outcome


def _one(
    importer: Any, reader: Any, caches: dict[str, Any], rng: random.Random, outcome: Outcome, groups: tuple[Group, ...]
) -> None:
    first = rng.randrange(KEYS - 1)
    end = rng.randrange(first + 1, KEYS + 1)
    found = supply(reader, GroupChain(groups, CHAIN), 4 * first, 4 * end)
    if found is None:
        return
    names = [(number, key) for number, group in enumerate(groups) for key in needed(group, 4 * first, found.tokens)]
    targets = np.array(rng.sample(range(BLOCKS), len(names)), np.int32)
    job = ImportJob("r", "owner", reader.epoch, found.block_ids, found.states, targets, found.counts)
    importer.start(job, reader, gently=rng.random() < 0.5)
    results: list[Any] = []
    until = time.monotonic() + 20
    while not results and time.monotonic() < until:
        results = importer.poll()
    failed = set(results[0].failed_blocks)
    outcome.imports += 1
    outcome.check_failures += len(failed)
    for name, target in zip(names, targets.tolist(), strict=True):
        right = all(bool((caches[f"0.{layer}"][target] == _content(name, layer)).all()) for layer in range(LAYERS))
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
    parser.add_argument("--several", action="store_true", help="three KV cache groups instead of one")
    given = parser.parse_args()
    path = Path(f"/dev/shm/peerkv-races-{os.getpid()}")
    try:
        print(race(tuple(given.devices), path, given.imports, given.seconds, several=given.several))
    finally:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    main()
