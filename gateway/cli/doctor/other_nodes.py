"""What the doctor says of other nodes: whether they are heard, and what keeps them apart. Pure but for `look`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.fleet import FileFleet, FleetError, FleetSnapshot
from engine.joined_fleet import NodesTold, WayTold, difference, read_nodes
from engine.node.fetch_counts import FetchCounts, read_fetches
from gateway.cli.doctor.finding import Finding


@dataclass(frozen=True, slots=True)
class OtherNode:
    """Another node: `ready` of its replicas are; `apart` says why they take none of our requests, "" if they do.

    `way` is how its blocks come, `came` what came of them.
    """

    name: str
    address: str
    ready: int
    replicas: int
    trouble: str
    apart: str
    way: WayTold
    came: FetchCounts


@dataclass(frozen=True, slots=True)
class OtherNodes:
    """What other nodes call this one, those that it was told of, and why no more are found, if they are looked for."""

    here: str
    nodes: tuple[OtherNode, ...]
    trouble: str


ALONE = OtherNodes("", (), "")


def look(run_dir: Path) -> OtherNodes:
    """Return what the agent wrote down, beside what this node serves."""
    try:
        own = FileFleet(run_dir).snapshot()
    except FleetError:  # of another release: the report says so elsewhere
        return ALONE
    return seen(read_nodes(run_dir), own, read_fetches(run_dir))


def seen(told: NodesTold, own: FleetSnapshot, fetches: Mapping[str, FetchCounts]) -> OtherNodes:
    """Return what is told of other nodes, compared with what this one serves; `fetches` are what came from each."""
    nodes = []
    for node in told.nodes:
        replicas = node.fleet.replicas if node.fleet is not None else ()
        ready = sum(replica.state == "ready" for replica in replicas)
        apart = difference(own, node.fleet) if node.fleet is not None else ""
        came = fetches.get(node.name, FetchCounts())
        nodes.append(OtherNode(node.name, node.address, ready, len(replicas), node.trouble, apart, node.way, came))
    return OtherNodes(told.here, tuple(nodes), told.trouble)


def node_lines(found: OtherNodes) -> Iterator[str]:
    """Return the report's lines; none where this node is alone."""
    if not found.here:
        return
    yield f"Other nodes, which call this one {found.here}"
    for node in found.nodes:
        heard = "is not heard" if node.trouble else f"{node.ready} of {node.replicas} replicas ready, {way_in_words(node.way)}"
        yield f"  {node.name}   {node.address}, {heard}"
        if node.came.fetches:
            yield f"    {came_in_words(node.came)}"
    if not found.nodes:
        yield "  none so far"


def came_in_words(came: FetchCounts) -> str:
    """Say how many blocks came, how fast, and how many did not, by why."""
    failed = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in came.failed_blocks.items())
    size = f"{came.blocks} blocks of it came, {came.bytes / 1e6:.1f} MB in {came.seconds:.1f} s"
    return size + (f"; others did not: {failed}" if failed else "")


def way_in_words(way: WayTold) -> str:
    """Say how a node's blocks come, why, and how fast that was measured to be."""
    rates = {"TCP": way.tcp_bytes_per_second, "NIXL": way.nixl_bytes_per_second}
    measured = " and ".join(f"{rate / 1e9:.1f} GB/s by {name}" for name, rate in rates.items() if rate)
    why = "; ".join(filter(None, (way.reason, measured and f"measured {measured}")))
    return f"blocks come by {'NIXL, unencrypted' if way.transport == 'nixl' else 'TCP'}" + (f" ({why})" if why else "")


def judge_nodes(found: OtherNodes) -> Iterator[Finding]:
    """Yield what keeps nodes apart."""
    for node in found.nodes:
        if node.trouble:
            remedy = "see node.log there and here; both ports of --node-address must be open, and the keys of one authority"
            yield Finding(True, f"{node.name} is not heard: {node.trouble}", remedy)
        elif node.apart:
            remedy = "start both with the same model and the same options of vLLM"
            yield Finding(True, f"{node.name} takes none of our requests: {node.apart}", remedy)
    if found.trouble:
        yield Finding(
            True, f"no new nodes are found: {found.trouble}", "those that are heard go on; see to the server of --join"
        )
