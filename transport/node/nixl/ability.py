"""Whether this node can read and offer blocks by NIXL, and why not. NIXL itself is not loaded here."""

import fcntl
import importlib.metadata
import importlib.util
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Choice = Literal["auto", "tcp", "nixl"]
"""`auto`: NIXL by RDMA alone, where it is sooner; `tcp`: never NIXL; `nixl`: NIXL by whatever there is, unencrypted TCP too."""
VARIANTS = {"nixl-cu13": "nixl_cu13", "nixl-cu12": "nixl_cu12"}
"""Distributions and their packages. One process can load one of them alone."""
DEVICES = Path("/sys/class/infiniband")
ONLY_RDMA = {"UCX_TLS": "^tcp"}
DEFAULTS = {
    "UCX_TCP_TX_SEG_SIZE": "128k",  # with UCX's own 8k it takes twice the CPU time
    "UCX_TCP_RX_SEG_SIZE": "128k",
    "UCX_TCP_KEEPIDLE": "1s",  # a link that is down is noticed after 3 s, not 19
    "UCX_TCP_KEEPINTVL": "1s",
    "UCX_TCP_KEEPCNT": "2",
    "UCX_RCACHE_MAX_UNRELEASED": "1024",  # as vLLM sets it: a leak otherwise
    "UCX_HANDLE_ERRORS": "none",  # or it would print and wait where it should end
}
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True)
class Ability:
    """`version` of NIXL, "" without it, and then the `reason`; `package` is where it lies.

    `devices` tells whether there are RDMA devices, `only_rdma` whether nothing else may be used.
    """

    version: str = ""
    reason: str = ""
    package: str = ""
    devices: bool = False
    only_rdma: bool = False


def ability(choice: Choice, devices: Path = DEVICES) -> Ability:
    """Return what this node can do with NIXL, as far as that is known without starting it."""
    if choice == "tcp":
        return Ability(reason="node_transport is tcp")
    found = next((name for name, package in VARIANTS.items() if importlib.util.find_spec(package) is not None), None)
    if found is None:
        return Ability(reason="NIXL is not installed")
    active = any(_active(devices))
    if choice == "auto" and not active:
        return Ability(reason="no RDMA device is active")
    try:
        version = importlib.metadata.version(found)
    except importlib.metadata.PackageNotFoundError:
        return Ability(reason="NIXL is not installed as a package")
    return Ability(version, "", VARIANTS[found], active, choice == "auto")


NO_NIXL = Ability(reason="NIXL is not in use")


def agreed_with(ours: Ability, theirs: str) -> Ability:
    """Return ours, if the other node has the same version of NIXL: what they tell each other has no version of its own."""
    if not ours.version or ours.version == theirs:
        return ours
    return Ability(reason=f"NIXL is {ours.version} here" + (f", {theirs} there" if theirs else ", there is none there"))


def environment(found: Ability, host: str, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment of a process with NIXL on the node at `host`."""
    made = {**DEFAULTS, **given}
    if found.only_rdma:
        return made | ONLY_RDMA
    if not found.devices and (name := interface_of(host)):
        made.setdefault("UCX_NET_DEVICES", name)  # or UCX would listen on all of them
    return made


def interface_of(host: str) -> str:
    """Return the network interface that has an IPv4 address; "" if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(found[20:24]) == host:
                return name
    return ""


def _active(devices: Path) -> Iterator[Path]:
    for state in devices.glob("*/ports/*/state"):
        try:
            if "ACTIVE" in state.read_text():
                yield state
        except OSError:  # it was taken away
            continue
