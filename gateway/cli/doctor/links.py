"""How fast the GPUs of this machine read each other, measured by a separate program (transport/backends/link_probe.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from gateway.cli.doctor.machine import Machine

PROBE_SECONDS_MAX = 60.0
PROBE_COMMAND = (sys.executable, "-m", "transport.backends.link_probe")


@dataclass(frozen=True, slots=True)
class Speed:
    """What `reader` copies out of `owner`'s memory (UUIDs), in 1e9 bytes per second; 0 with the reason in `error`."""

    reader: str
    owner: str
    gb_per_s: float
    error: str


@dataclass(frozen=True, slots=True)
class LinkSpeeds:
    """The measured pairs, by (reader, owner) in nvidia-smi's numbers; `error` says why there are none, or is ""."""

    speeds: dict[tuple[int, int], Speed]
    error: str = ""


def measure(machine: Machine, command: tuple[str, ...] = PROBE_COMMAND) -> LinkSpeeds | None:
    """Measure the pairs that CUDA_VISIBLE_DEVICES allows; None with fewer than two GPUs. Takes about ten seconds.

    Never raises for something the machine lacks; PROBE_SECONDS_MAX bounds the time.
    """
    if len(machine.gpus) < 2 or machine.cpu_only_vllm:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return LinkSpeeds({}, f"the links were not measured: {error}")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return LinkSpeeds({}, f"the links were not measured: {last}")
    index = {gpu.uuid: gpu.index for gpu in machine.gpus}
    try:
        found = msgspec.json.decode(done.stdout, type=list[Speed])
    except msgspec.MsgspecError as error:
        return LinkSpeeds({}, f"the links were not measured: the probe's output cannot be read: {error}")
    return LinkSpeeds({(index[s.reader], index[s.owner]): s for s in found if s.reader in index and s.owner in index})


def matrix_lines(machine: Machine, measured: LinkSpeeds) -> Iterator[str]:
    """Return the matrix as text: a row per reader, a column per owner, nvidia-smi's name of the path and GB/s in each cell."""
    if measured.error:
        yield f"  GPU links   {measured.error}"
        return
    shown = sorted({reader for reader, _ in measured.speeds})
    paths = {frozenset((link.first, link.second)): link.path for link in machine.links}
    width = 14
    yield "  GPU links   GB/s at which a row's GPU reads a column's, measured now"
    yield " " * 14 + "".join(f"{f'GPU {owner}':>{width}}" for owner in shown)
    for reader in shown:
        cells = []
        for owner in shown:
            speed = measured.speeds.get((reader, owner))
            path = paths.get(frozenset((reader, owner)), "?")
            cells.append("-" if speed is None else f"{path} {f'{speed.gb_per_s:.0f}' if not speed.error else 'none'}")
        yield f"      GPU {reader:<4}" + "".join(f"{cell:>{width}}" for cell in cells)
    for (reader, owner), speed in sorted(measured.speeds.items()):
        if speed.error:
            yield f"              GPU {reader} does not read GPU {owner}: {speed.error}"
