"""NIXL on one node: a process that owners' memory is read from, and one that reads into ours.

They are two, so that one which has to be ended, for what it may yet write, takes nothing away from the nodes that read here.
"""

import os
import uuid

from transport.backends.shared_memory import region_of
from transport.node.block_client import BlockClient
from transport.node.messages import PROBE_BLOCK_BYTES, PROBE_BLOCKS
from transport.node.nixl.ability import Ability, environment
from transport.node.nixl.client import NixlClient, agent_of
from transport.node.nixl.owner import NixlOwner
from transport.node.nixl.process import NixlProcess
from transport.table.layout import Region


class NixlNode:
    """The node `name` at `host`, which reads into the memory `target`. Raises OSError if that for the probe cannot be had."""

    def __init__(self, name: str, host: str, found: Ability, target: Region) -> None:
        self.found = found
        size = PROBE_BLOCKS * PROBE_BLOCK_BYTES
        self._fd = os.memfd_create("peerkv-probe", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        around, life = environment(found, host), uuid.uuid4().hex  # no agent of NIXL may know two others of one name
        self.owning = NixlProcess(agent_of(name) + life, found, around, None)
        self.reading = NixlProcess(f"nixl-reader-{name}-{life}", found, around, target)
        self.owner = NixlOwner(self.owning, found, region_of(self._fd, size))

    def start(self) -> None:
        """Start both processes; nothing waits for them."""
        self.owning.start()
        self.reading.start()

    def client(self, client: BlockClient) -> NixlClient:
        """Return a way to the node that `client` asks."""
        return NixlClient(client, self.reading)

    def close(self) -> None:
        """End both processes: nothing is written, and nothing is read here, once this returns."""
        self.reading.close()
        self.owning.close()
        os.close(self._fd)
