"""What /kv/stats says of other nodes is what this node's agent wrote down."""

from pathlib import Path

from engine.joined_fleet import NodesTold, NodeTold, WayTold, write_nodes
from gateway.stats.node_stats import node_stats


def test_a_node_that_is_not_heard_says_why_and_how_often_it_fell_silent(tmp_path: Path) -> None:
    way = WayTold("nixl", "it is sooner", 1.0, 2.0)
    write_nodes(tmp_path, NodesTold("node-a", (NodeTold("node-b", "10.0.0.2:7710", trouble="silent", way=way, losses=3),)))
    (node,) = node_stats(tmp_path)
    assert node.model_dump() == {
        "name": "node-b",
        "address": "10.0.0.2:7710",
        "trouble": "silent",
        "losses": 3,
        "transport": "nixl",
        "transport_reason": "it is sooner",
        "tcp_bytes_per_second": 1.0,
        "nixl_bytes_per_second": 2.0,
    }
    assert node_stats(tmp_path / "nowhere") == []
