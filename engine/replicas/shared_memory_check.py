"""Whether shared memory has room for what the replicas keep there, checked before they start."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from engine.fleet import FleetError
from engine.host_process.named_memory import named_bytes, prepare, wait_until_unused
from engine.replicas.free_memory import free_bytes
from engine.replicas.launch import CPU_KV_BYTES, EngineSettings

SHARED_MEMORY = Path("/dev/shm")
HOST_MEMORY_SHARE, HOST_MEMORY_MIN, HOST_MEMORY_MAX = 0.25, 256 << 20, 64 << 30
KV_FLAG = "--kv-cache-memory-bytes"
# vLLM's own suffixes: small ones are decimal, capital ones binary.
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class SharedMemoryTooSmall(FleetError):
    """The replicas' KV does not fit into shared memory, so they could not exchange it; the message says what to change."""


class HostMemoryTooLarge(FleetError):
    """More host memory is asked for than there is; the message says how much that is."""


class HostMemoryDirRefused(FleetError):
    """Host memory cannot be kept in files of the directory that was asked for; the message says why."""


def check_room(*fleets: EngineSettings) -> None:
    """Raise SharedMemoryTooSmall if even an empty file system could not hold the KV of all fleets' replicas.

    If it fills up later, a replica says so and serves without sharing.
    """
    need, replicas = sum(map(shared_kv_bytes, fleets)), sum(each.replicas for each in fleets)
    status = os.statvfs(SHARED_MEMORY)
    size = status.f_blocks * status.f_frsize
    if need > size:
        raise SharedMemoryTooSmall(
            f"{SHARED_MEMORY} has {size >> 20} MiB, and the KV of {replicas} replicas takes {need >> 20}: make it"
            f" larger (mount -o remount,size={(need >> 30) + 1}g {SHARED_MEMORY}; in a container --shm-size, SHM_SIZE for"
            f" compose.yaml, the volume's sizeLimit in Kubernetes), or give vLLM a smaller {KV_FLAG}"
        )


def check_host_memory(*fleets: EngineSettings) -> None:
    """Raise HostMemoryTooLarge if the host memory of all fleets is more than is free: its pages are taken one by one, later.

    What their named files took at an earlier start counts as free. Raises HostMemoryDirRefused if there can be none.
    """
    asked = sum(each.host_memory_bytes_each * each.replicas for each in fleets)
    free = free_bytes()
    for directory, table_dir in {each.host_memory_dir: each.table_dir for each in fleets if each.host_memory_dir}.items():
        try:
            prepare(directory, table_dir)
        except OSError as error:
            raise HostMemoryDirRefused(f"host_memory_dir {directory}: {error.strerror}") from error
        fleets_there = [each for each in fleets if each.host_memory_dir == directory]
        free += named_bytes(directory, [name for each in fleets_there for name in _names(each)])
    if asked > free:
        raise HostMemoryTooLarge(f"host_memory asks for {asked >> 20} MiB, and {free >> 20} MiB are free here: ask for less")


async def wait_for_host_memory_dir(*fleets: EngineSettings) -> None:
    """Return once no other peerkv keeps memory of these replicas in their named files: they would have none.

    Waits at most `claim_seconds_max` of each. Raises HostMemoryDirRefused.
    """
    for each in fleets:
        if each.host_memory_dir is None or not each.host_memory_bytes_each:
            continue
        try:
            await wait_until_unused(each.host_memory_dir, _names(each), each.claim_seconds_max)
        except BlockingIOError as error:
            raise HostMemoryDirRefused(
                f"host_memory_dir {each.host_memory_dir}: {error.strerror}: stop it, or give each a directory of its own"
            ) from None


def _names(fleet: EngineSettings) -> list[str]:
    return [fleet.replica_name(index) for index in range(fleet.replicas)]


def safe_host_memory(*fleets: EngineSettings) -> int:
    """Return how much host memory all fleets together can have and leave room for all else, in bytes.

    It is HOST_MEMORY_SHARE of what is free and not for their KV; 0 where that is less than HOST_MEMORY_MIN.
    """
    left = free_bytes() - sum(map(shared_kv_bytes, fleets))
    size = min(int(left * HOST_MEMORY_SHARE), HOST_MEMORY_MAX) >> 20 << 20
    return size if size >= HOST_MEMORY_MIN else 0


def shared_kv_bytes(settings: EngineSettings) -> int:
    """Return the shared memory that all replicas' KV takes: none on GPUs or without our connector."""
    if settings.devices or not settings.connector or settings.launcher is not None:
        return 0
    return settings.replicas * kv_bytes_each(settings.vllm_args)


def kv_bytes_each(vllm_args: Sequence[str]) -> int:
    """The KV of a replica on the CPU under these vLLM options; 0 for a size that cannot be read here: vLLM says so itself."""
    found = str(CPU_KV_BYTES)
    for at, argument in enumerate(vllm_args):
        flag, equals, value = argument.partition("=")
        if flag.replace("_", "-") == KV_FLAG:
            found = value if equals else (vllm_args[at + 1] if at + 1 < len(vllm_args) else "")
    parsed = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", found.strip())
    return int(float(parsed[1]) * _UNITS[parsed[2]]) if parsed else 0
