"""The part of GET /kv/stats on other nodes: whether they are heard, and how their blocks come."""

from pathlib import Path

from pydantic import BaseModel, Field

from engine.joined_fleet import read_nodes


class NodeStats(BaseModel):
    """Another node."""

    name: str
    address: str
    trouble: str = Field(description="why it is not heard; empty if it is")
    losses: int = Field(description="how often it was heard and then no more, since this node's agent began")
    transport: str = Field(description="how its blocks come: tcp or nixl")
    transport_reason: str = Field(description="why so")
    tcp_bytes_per_second: float = Field(description="as measured last; 0 until it was")
    nixl_bytes_per_second: float = Field(description="as measured last; 0 where there is none")


def node_stats(run_dir: Path) -> list[NodeStats]:
    """Return what this node's agent wrote down of the others."""
    return [
        NodeStats(
            name=node.name,
            address=node.address,
            trouble=node.trouble,
            losses=node.losses,
            transport=node.way.transport,
            transport_reason=node.way.reason,
            tcp_bytes_per_second=node.way.tcp_bytes_per_second,
            nixl_bytes_per_second=node.way.nixl_bytes_per_second,
        )
        for node in read_nodes(run_dir).nodes
    ]
