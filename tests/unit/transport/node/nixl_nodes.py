"""Nodes with NIXL over TCP on loopback, for tests; skipped where it is not installed."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest

from tests.unit.waiting import until
from transport.node.nixl.ability import ability
from transport.node.nixl.node import NixlNode
from transport.node.staging import Staging

needs_nixl = pytest.mark.skipif(
    not ability("nixl").version, reason="NIXL is not installed (CONTRIBUTING.md says how its tests are run)"
)
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root, and iproute2"
)
STAGING_BYTES = 32 << 20
_numbers = itertools.count()


@contextmanager
def over_tcp() -> Iterator[None]:
    """Have UCX use TCP: between two processes of one machine it would go by shared memory."""
    with mock.patch.dict(os.environ, {"UCX_TLS": "tcp,self"}):
        yield


@contextmanager
def two_spaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces joined by a cable that is called as they are, in 10.78.0.0/24."""
    number = next(_numbers)  # a package's pair may be there when a module makes its own
    names = f"pkn{os.getpid() % 10000}-{number}a", f"pkn{os.getpid() % 10000}-{number}b"
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for host, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.78.0.{host}/24", "dev", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", name, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def ip(*words: str) -> None:
    """Run ip(8)."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


class NixlPair:
    """What node-a lets others read, and how node-b reads it into `staging`: NIXL alone may be in two network namespaces."""

    def __init__(self, spaces: tuple[str, str] | None = None) -> None:
        self.staging = Staging(STAGING_BYTES)
        found = ability("nixl")
        self.a = NixlNode("node-a", "127.0.0.1", found, self.staging.region)
        self.b = NixlNode("node-b", "127.0.0.1", found, self.staging.region)
        for space, process in zip(spaces or (), (self.a.owning, self.b.reading), strict=False):
            process.command[:0] = ["ip", "netns", "exec", space]
            process.environment["UCX_NET_DEVICES"] = space
        self.spaces = spaces
        self.a.owning.start()
        self.b.reading.start()
        until(lambda: not self.a.owning.trouble and not self.b.reading.trouble, "NIXL")

    def close(self) -> None:
        self.b.close()
        self.a.close()
        self.staging.close()


@contextmanager
def nixl_pair(apart: bool = False) -> Iterator[NixlPair]:
    """A pair; `apart`: in two namespaces."""
    with over_tcp(), two_spaces() if apart else nullcontext() as spaces:
        pair = NixlPair(spaces)
        try:
            yield pair
        finally:
            pair.close()
