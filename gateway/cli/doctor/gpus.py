"""The GPUs of this machine and the paths between them, according to nvidia-smi."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NVIDIA_SMI_SECONDS = 20.0
GPU_FIELDS = "index,name,memory.total,compute_mode,mig.mode.current,uuid"
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")
DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU according to nvidia-smi; `memory_mib` is 0 if unknown."""

    index: int
    name: str
    memory_mib: int
    compute_mode: str
    mig: bool
    uuid: str


@dataclass(frozen=True, slots=True)
class Link:
    """The path between two GPUs in nvidia-smi's terms: `path` is "NV18", "PIX", "SYS", …; `peer_read` "OK", "NS", …."""

    first: int
    second: int
    path: str
    peer_read: str


def find_gpus() -> tuple[tuple[Gpu, ...], tuple[Link, ...], str]:
    """Return the GPUs, the paths between them, and what went wrong; takes about a second if there are GPUs."""
    if shutil.which("nvidia-smi") is None:
        return (), (), ""
    listing, error = _nvidia_smi(f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits")
    gpus = parse_gpus(listing)
    if error or len(gpus) < 2:
        return gpus, (), error
    paths, error = _nvidia_smi("topo", "-m")
    reads, more = _nvidia_smi("topo", "-p2p", "r")
    by_path, by_read = parse_matrix(paths), parse_matrix(reads)
    pairs = [(a.index, b.index) for a in gpus for b in gpus if a.index < b.index]
    return gpus, tuple(Link(*pair, by_path.get(pair, "?"), by_read.get(pair, "?")) for pair in pairs), error or more


def driver_gpus() -> int:
    """Return how many GPUs the driver knows, including those hidden from this process; 0 if it does not say."""
    try:
        return len(os.listdir(DRIVER_GPUS))
    except OSError:
        return 0


def parse_gpus(listing: str) -> tuple[Gpu, ...]:
    """The GPUs in `nvidia-smi --query-gpu=GPU_FIELDS --format=csv,noheader,nounits`."""
    gpus = []
    for line in listing.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 6 and parts[0].isdigit():
            memory = int(parts[2]) if parts[2].isdigit() else 0
            gpus.append(Gpu(int(parts[0]), parts[1], memory, parts[3], parts[4] == "Enabled", parts[5]))
    return tuple(gpus)


def parse_matrix(text: str) -> dict[tuple[int, int], str]:
    """The GPU to GPU cells of `nvidia-smi topo -m` or `-p2p r`, by (row, column)."""
    rows = [TERMINAL_CODES.sub("", line).split() for line in text.splitlines()]
    header: list[int] = []
    cells: dict[tuple[int, int], str] = {}
    for words in rows:
        names = [int(word[3:]) for word in words if re.fullmatch(r"GPU\d+", word)]
        if not header and names:
            header = names
        elif header and words and re.fullmatch(r"GPU\d+", words[0]):
            row = int(words[0][3:])
            for column, word in zip(header, words[1:], strict=False):
                cells[row, column] = word
    return cells


def _nvidia_smi(*arguments: str) -> tuple[str, str]:
    """(output, error in words)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi {arguments[0]}: {error}"
    return done.stdout, "" if done.returncode == 0 else f"nvidia-smi {arguments[0]}: {(done.stderr or done.stdout).strip()}"
