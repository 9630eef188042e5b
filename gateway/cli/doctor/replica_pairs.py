"""What the replicas of a running fleet can exchange, pair by pair: read from fleet.json and the block tables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from engine.fleet import FLEET_FILE, FileFleet, FleetSnapshot, ReplicaState, own_pid_namespace
from gateway.cli.doctor.gpus import Link
from transport.fingerprint import fingerprint_difference
from transport.table.directory import TableDirectory
from transport.table.tiers import host_memory_of

TRANSPORT_WORDS = {"shared_memory": "shared memory", "cuda_ipc": "CUDA IPC"}
PATH_WORDS = {
    "PIX": "PCIe, one switch",
    "PXB": "PCIe, several switches",
    "PHB": "PCIe through the CPU",
    "NODE": "PCIe across host bridges",
    "SYS": "PCIe and the link between CPU sockets",
    "?": "a path that nvidia-smi does not name",
}


@dataclass(frozen=True, slots=True)
class FleetMember:
    """One replica and what its table says; `status` is "ok" or why it shares nothing ("" while it has no table)."""

    name: str
    state: str
    reason: str
    device: str
    log: str
    pid: int | None
    process: str
    status: str
    transport: str
    blocks: int
    cached_blocks: int
    fingerprint: Mapping[str, str]
    stored: tuple[int, int] | None = None
    """Blocks that it keeps in host memory, and the slots there; None where it has no host memory."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """A running fleet; `error` says why it could not be read, in which case there are no members."""

    model: str
    table_dir: str
    members: tuple[FleetMember, ...]
    error: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replicas: how they exchange KV, or the reasons why they do not (`transport` is "" then).

    `mismatch` says that each of the two does share, but not with the other.
    """

    first: str
    second: str
    transport: str
    path: str
    reasons: tuple[str, ...]
    mismatch: bool


def read_fleet(run_dir: Path) -> Fleet | None:
    """Return the fleet that runs with this run_dir, None if there is none. Raises FleetError for a damaged fleet.json."""
    if not (run_dir / FLEET_FILE).exists():
        return None
    snapshot = FileFleet(run_dir).snapshot()
    return Fleet(snapshot.model, snapshot.table_dir, _members(snapshot)) if snapshot.replicas else None


def pairs_of(fleet: Fleet, links: tuple[Link, ...]) -> tuple[Pair, ...]:
    """Return every pair of replicas of the fleet."""
    paths = {(link.first, link.second): link for link in links}
    return tuple(_pair(a, b, paths) for a, b in combinations(fleet.members, 2))


def path_in_words(path: str) -> str:
    """Describe nvidia-smi's name of a path between GPUs."""
    if path.startswith("NV") and path[2:].isdigit():
        return f"NVLink, {path[2:]} links"
    return PATH_WORDS.get(path, path)


def _members(snapshot: FleetSnapshot) -> tuple[FleetMember, ...]:
    tables = TableDirectory(Path(snapshot.table_dir)).tables()
    members = []
    for replica in snapshot.replicas:
        table, tier = tables.get(replica.name), tables.get(host_memory_of(replica.name))
        members.append(
            FleetMember(
                name=replica.name,
                state=replica.state.value,
                reason=replica.reason,
                device=replica.device,
                log=replica.log,
                pid=replica.pid,
                process=_process(replica.pid, snapshot.pid_namespace),
                status=table.status if table else "",
                transport=table.transport if table else "",
                blocks=table.num_blocks if table else 0,
                cached_blocks=table.cached_blocks() if table else 0,
                fingerprint=dict(table.fingerprint_fields) if table else {},
                stored=(tier.cached_blocks(), tier.num_blocks) if tier else None,
            )
        )
    return tuple(members)


def _process(pid: int | None, pid_namespace: int) -> str:
    """Whether a replica's process is in our namespaces: "ok", "elsewhere", "unseen", "foreign ipc" or "unknown".

    "elsewhere" is another PID namespace, where the process cannot be inspected from here, but its table can.
    """
    if pid is None:
        return "unknown"
    if pid_namespace not in (0, own_pid_namespace()):
        return "elsewhere"
    try:
        theirs = os.stat(f"/proc/{pid}/ns/ipc").st_ino
        return "ok" if theirs == os.stat("/proc/self/ns/ipc").st_ino else "foreign ipc"
    except FileNotFoundError:
        return "unseen"
    except OSError:
        return "unknown"


def _pair(a: FleetMember, b: FleetMember, paths: Mapping[tuple[int, int], Link]) -> Pair:
    reasons = [f"{m.name} is {m.state}" for m in (a, b) if m.state not in (ReplicaState.READY, ReplicaState.DRAINING)]
    if not reasons:
        reasons = [f"{m.name}: {m.status or 'has no block table'}" for m in (a, b) if m.status != "ok"]
    alone = bool(reasons)
    if not reasons:
        reasons = list(fingerprint_difference(a.fingerprint, b.fingerprint))
    if not reasons and a.transport != b.transport:
        reasons = [f"{a.name} offers {_words(a.transport)}, {b.name} {_words(b.transport)}"]
    link = paths.get(_gpus(a, b))
    if not reasons and a.transport == "cuda_ipc" and link and link.peer_read not in ("OK", "?"):
        reasons = [f"GPU {link.first} and GPU {link.second} cannot read each other ({link.peer_read})"]
    path = path_in_words(link.path) if link else ""
    return Pair(a.name, b.name, "" if reasons else _words(a.transport), path, tuple(reasons), bool(reasons) and not alone)


def _words(transport: str) -> str:
    return TRANSPORT_WORDS.get(transport, transport or "nothing")


def _gpus(a: FleetMember, b: FleetMember) -> tuple[int, int]:
    """Return the pair of GPU indices, the lower one first; (-1, -1) if either is not on a single GPU named by its index."""
    found = [m.device.removeprefix("cuda:") for m in (a, b)]
    if not all(name.isdigit() for name in found):
        return (-1, -1)
    first, second = sorted(int(name) for name in found)
    return first, second
