"""The part of GET /kv/stats on other nodes: whether they are heard, how and how many of their blocks come; as metrics too."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, Field

from engine.joined_fleet import read_nodes
from engine.node.fetch_counts import FetchCounts, read_fetches


class NodeStats(BaseModel):
    """Another node. What is counted is counted since this node's agent began."""

    name: str
    address: str
    trouble: str = Field(description="why it is not heard; empty if it is")
    losses: int = Field(description="how often it was heard and then no more")
    transport: str = Field(description="how its blocks come: tcp or nixl")
    transport_reason: str = Field(description="why so")
    tcp_bytes_per_second: float = Field(description="as measured last; 0 until it was")
    nixl_bytes_per_second: float = Field(description="as measured last; 0 where there is none")
    fetches: int = Field(0, description="times that a replica here asked for blocks of it")
    fetched_blocks: int = Field(0, description="blocks that came")
    fetched_bytes: int = Field(0, description="bytes of those blocks")
    fetch_seconds: float = Field(0.0, description="time from asking to the answer, of all of them")
    failed_blocks: dict[str, int] = Field(
        {},
        description="blocks that were asked for and did not come, by why: `changed` (not what was looked up any more), `silent`"
        " (nothing came for seconds), `slow` (20 s were over), `failed` (the connection), `no_room` (in staging_memory),"
        " `not_heard`",
    )


def node_stats(run_dir: Path) -> list[NodeStats]:
    """Return what this node's agent wrote down of the others."""
    fetches, none = read_fetches(run_dir), FetchCounts()
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
            fetches=(counts := fetches.get(node.name, none)).fetches,
            fetched_blocks=counts.blocks,
            fetched_bytes=counts.bytes,
            fetch_seconds=counts.seconds,
            failed_blocks=counts.failed_blocks,
        )
        for node in read_nodes(run_dir).nodes
    ]


def node_metrics(nodes: Sequence[NodeStats]) -> Iterator[Metric]:
    """Yield the figures of other nodes, each with a label `node`."""
    one = ("node",)
    heard = GaugeMetricFamily("peerkv_node_heard", "1 while the other node is heard.", labels=one)
    rate = GaugeMetricFamily(
        "peerkv_node_network_bytes_per_second", "As measured last of the way that blocks come.", labels=("node", "transport")
    )
    losses = CounterMetricFamily("peerkv_node_losses", "Times that it was heard and then no more.", labels=one)
    fetches = CounterMetricFamily("peerkv_node_fetches", "Times that blocks of it were asked for.", labels=one)
    blocks = CounterMetricFamily("peerkv_node_fetched_blocks", "Blocks that came from it.", labels=one)
    size = CounterMetricFamily("peerkv_node_fetched_bytes", "Bytes of KV that came from it.", labels=one)
    seconds = CounterMetricFamily("peerkv_node_fetch_seconds", "Time from asking for blocks to the answer.", labels=one)
    failed = CounterMetricFamily("peerkv_node_failed_blocks", "Blocks that did not come, by why.", labels=("node", "reason"))
    for node in nodes:
        labels = (node.name,)
        heard.add_metric(labels, float(not node.trouble))
        measured = node.nixl_bytes_per_second if node.transport == "nixl" else node.tcp_bytes_per_second
        rate.add_metric((node.name, node.transport), measured)
        losses.add_metric(labels, node.losses)
        fetches.add_metric(labels, node.fetches)
        blocks.add_metric(labels, node.fetched_blocks)
        size.add_metric(labels, node.fetched_bytes)
        seconds.add_metric(labels, node.fetch_seconds)
        for reason, count in node.failed_blocks.items():
            failed.add_metric((node.name, reason), count)
    yield from (heard, rate, losses, fetches, blocks, size, seconds, failed)
