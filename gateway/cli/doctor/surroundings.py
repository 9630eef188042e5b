"""Findings about a start's surroundings: memory, directories, the port, access. Containers get these wrong most often."""

from __future__ import annotations

from collections.abc import Iterator

from gateway.cli.doctor.finding import Finding, in_words
from gateway.cli.doctor.machine import Machine
from gateway.tenants.loopback import is_loopback

TABLES_BYTES = 64 << 20
# A replica on the CPU without its KV: torch, vLLM and the default model, measured at 0.6 to 1.3 GB.
CPU_REPLICA_BYTES = 1_300_000_000


def judge_room(machine: Machine) -> Iterator[Finding]:
    """Before a start: is there enough room for the replicas?"""
    on_cpu = machine.cpu_only_vllm or not machine.gpus
    kv_bytes = machine.kv_bytes if on_cpu else 0
    need = TABLES_BYTES + kv_bytes
    if machine.shm_free_bytes < need:
        what = f"the block tables and the KV of {machine.replicas} replicas need" if on_cpu else "the block tables need"
        yield Finding(
            True,
            f"/dev/shm has {in_words(machine.shm_free_bytes)} free; {what} {in_words(need)}",
            "mount -o remount,size=4g /dev/shm; for a container --shm-size=4g (SHM_SIZE for compose.yaml; in Kubernetes the"
            " sizeLimit of the volume at /dev/shm)",
        )
    wanted = machine.replicas * CPU_REPLICA_BYTES + kv_bytes
    if on_cpu and machine.memory_free_bytes < wanted:
        free = in_words(machine.memory_free_bytes)
        what = f"{free} of memory are available; {machine.replicas} replicas take about {in_words(wanted)}"
        yield Finding(True, what, "stop something, or start fewer replicas: --replicas 1, or of several models in their tables")
    if on_cpu and machine.cores < machine.replicas:
        what = f"{machine.cores} {'core' if machine.cores == 1 else 'cores'} for {machine.replicas} replicas"
        yield Finding(False, what, "--replicas 1, or fewer in the tables of several models")


def judge_directories(machine: Machine) -> Iterator[Finding]:
    """Before a start: may peerkv write to its directories?"""
    for setting, path in machine.unwritable:
        yield Finding(
            True,
            f"user {machine.user} may not write to {path} ({setting})",
            f"chown {machine.user} {path}; a container's volume belongs to the user of the image, 10001: in Kubernetes fsGroup",
        )


def judge_descriptors(machine: Machine) -> Iterator[Finding]:
    """Before a start: do the descriptors suffice for the bounds that are asked for?"""
    if machine.descriptors_short:
        what, _, remedy = machine.descriptors_short.partition(": ")
        yield Finding(True, what, remedy)


def judge_port(machine: Machine) -> Iterator[Finding]:
    """Before a start: is the gateway's address free?"""
    where = f"{machine.host}:{machine.port}"
    if machine.gateway_answers:
        what = f"a gateway of peerkv has {where}, but no replicas run in the run_dir that was examined"
        remedy = "start `peerkv engine` with its run_dir (containers: one volume in both), or ask with its own --run-dir"
        yield Finding(True, what, remedy)
    elif machine.port_error:
        what = f"{where} cannot be listened on: {machine.port_error}"
        yield Finding(True, what, "stop the program that listens there, or choose another with --port (PEERKV_PORT)")


def judge_access(machine: Machine) -> Iterator[Finding]:
    """Can the intended callers, and nobody else, reach /metrics and /kv/*, and read the keys file?"""
    if machine.keys_file_open:
        what = f"others than its owner may read the keys file {machine.keys_file_open}, and with it what salts are made of"
        yield Finding(True, what, f"chmod 600 {machine.keys_file_open}")
    if machine.gateway_refuses:
        what, _, remedy = machine.gateway_refuses.partition("; ")
        yield Finding(False, what, remedy or "give the gateway's own: --admin-key, PEERKV_ADMIN_KEY")
    if machine.admin_key:
        return
    if machine.host == "localhost" or is_loopback(machine.host):
        what = "no admin key is set: a proxy on this machine would make everybody an admin"
        yield Finding(False, what, "behind any proxy set an admin key: PEERKV_ADMIN_KEY")
        return
    what = (
        f"the gateway listens on {machine.host} without an admin key: /metrics and /kv/* answer nobody who comes through a"
        " proxy or a container's published port"
    )
    yield Finding(False, what, "set PEERKV_ADMIN_KEY (ADMIN_KEY_FILE for compose.yaml, the secret peerkv in Kubernetes)")
