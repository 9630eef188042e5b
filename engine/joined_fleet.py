"""The replicas of this node and of the nodes that its agent hears, as one fleet.

The agent (`engine.node`) writes what it hears into `nodes.json`, beside fleet.json: for each replica of another node a socket
of this node that leads there. Without that file, or when it goes, the fleet is this node's alone.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from engine.fleet import FleetControl, FleetError, FleetSnapshot, Replica, ReplicaState
from transport.node.messages import FleetTold
from transport.node.names import node_of, on_node

NODES_FILE = "nodes.json"
NODES_MAX = 1024
_STATES = {state.value: state for state in ReplicaState}


class WayTold(msgspec.Struct, frozen=True):
    """How blocks come from a node: by `transport`, tcp or nixl, for a reason. Bytes a second as measured, 0 if they are not."""

    transport: str = "tcp"
    reason: str = ""
    tcp_bytes_per_second: float = 0.0
    nixl_bytes_per_second: float = 0.0

    @property
    def bytes_per_second(self) -> float:
        """Of the transport that was chosen."""
        return self.nixl_bytes_per_second if self.transport == "nixl" else self.tcp_bytes_per_second


class NodeTold(msgspec.Struct, frozen=True):
    """Another node: its replicas, and the sockets here that lead to them.

    `trouble` says why it is not heard, `losses` how often it was heard and then no more since the agent began.
    """

    name: str
    address: str
    fleet: FleetTold | None = None
    sockets: dict[str, str] = {}
    trouble: str = ""
    way: WayTold = WayTold()
    losses: int = 0


class NodesTold(msgspec.Struct, frozen=True):
    """This node's name, and the other nodes. `trouble` says why no more of them are found."""

    here: str
    nodes: tuple[NodeTold, ...] = ()
    trouble: str = ""


NOBODY = NodesTold("")


def write_nodes(run_dir: Path, told: NodesTold) -> None:
    """Replace run_dir's nodes.json atomically."""
    fresh = run_dir / f"{NODES_FILE}.new"
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(told), indent=1))
    fresh.replace(run_dir / NODES_FILE)


def read_nodes(run_dir: Path) -> NodesTold:
    """Return what nodes.json says; nobody if there is none, or if it is another release's."""
    try:
        return msgspec.json.decode((run_dir / NODES_FILE).read_bytes(), type=NodesTold)
    except (OSError, msgspec.MsgspecError):
        return NOBODY


def difference(own: FleetSnapshot, theirs: FleetTold) -> str:
    """Say why the replicas of another node cannot serve what ours serve; "" if they can."""
    if theirs.served_model_name != own.served_model_name:
        return f"served model: {own.served_model_name} here, {theirs.served_model_name} there"
    if theirs.vllm_args != own.vllm_args:
        return "vLLM's options differ"  # without the options: they may hold a token
    return ""


def went_with_its_node(fleet: FleetSnapshot, replica: str) -> bool:
    """Tell whether a replica is gone because its node is not heard any more: nothing that it was asked for ended it."""
    return bool(node_of(replica)) and fleet.find(replica) is None


class JoinedFleet:
    """A FleetControl of `own` and of the nodes told in `run_dir`, which is looked at once in `hold_seconds` at most.

    Other nodes' replicas are not ours to drain or restart: that is FleetError.
    """

    def __init__(
        self, own: FleetControl, run_dir: Path, hold_seconds: float = 0.02, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._own = own
        self._run_dir = run_dir
        self._hold_seconds = hold_seconds
        self._clock = clock
        self._held_until = 0.0
        self._stamp: tuple[int, int] | None = None
        self._told = NOBODY
        self._joined: tuple[FleetSnapshot, NodesTold, FleetSnapshot] | None = None
        self._version = 0

    def snapshot(self) -> FleetSnapshot:
        """The newest known state. Raises FleetError as the own view does."""
        own, told = self._own.snapshot(), self._nodes()
        if not told.nodes and not told.here:
            return own
        if self._joined is None or self._joined[0] is not own or self._joined[1] is not told:
            self._version += 1
            same = [node for node in told.nodes if node.fleet is not None and not difference(own, node.fleet)]
            replicas = own.replicas + tuple(replica for node in same for replica in _of(node))
            # steering has one figure for all nodes before it imported from them: what is taken for too slow is never tried, and
            # what is slower than told is found out by its imports, so it is the fastest node's
            fastest = max((node.way.bytes_per_second for node in same), default=0.0)
            joined = replace(
                own,
                version=own.version + self._version,
                replicas=replicas,
                node=told.here,
                network_bytes_per_second=fastest,
            )
            self._joined = (own, told, joined)
        return self._joined[2]

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        """Another node's supervisor looks at its replicas itself."""
        if not node_of(name):
            self._own.suspect(name, overdue=overdue)

    @property
    def restarts(self) -> bool:
        """As the own fleet's."""
        return self._own.restarts

    async def drain(self, name: str) -> None:
        """As FleetControl's, for this node's replicas."""
        await self._own.drain(_ours(name))

    async def resume(self, name: str) -> None:
        """As FleetControl's, for this node's replicas."""
        await self._own.resume(_ours(name))

    async def restart(self, name: str) -> None:
        """As FleetControl's, for this node's replicas."""
        await self._own.restart(_ours(name))

    async def idle_in(self, name: str, seconds: float) -> bool:
        """As FleetControl's, for this node's replicas."""
        return await self._own.idle_in(_ours(name), seconds)

    def _nodes(self) -> NodesTold:
        now = self._clock()
        if now >= self._held_until:
            self._held_until = now + self._hold_seconds
            try:
                found = os.stat(self._run_dir / NODES_FILE)
                stamp = (found.st_mtime_ns, found.st_ino)
            except OSError:
                self._stamp, self._told = None, NOBODY
                return self._told
            if stamp != self._stamp:
                self._stamp, self._told = stamp, read_nodes(self._run_dir)
        return self._told


def _ours(name: str) -> str:
    if node_of(name):
        raise FleetError(f"{name} is another node's: that is for a gateway of {node_of(name)} to do")
    return name


def _of(node: NodeTold) -> list[Replica]:
    assert node.fleet is not None
    return [
        Replica(
            on_node(node.name, told.name),
            _STATES[told.state],
            node.sockets[told.name],
            None,
            told.restarts,
            told.reason,
            told.device,
            "",
        )
        for told in node.fleet.replicas
        if told.state in _STATES and told.name in node.sockets
    ]
