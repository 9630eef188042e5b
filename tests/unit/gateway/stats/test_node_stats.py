"""What /kv/stats and /metrics say of other nodes is what this node's agent wrote down."""

from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from engine.joined_fleet import NodesTold, NodeTold, WayTold, write_nodes
from engine.node.fetch_counts import FETCHES_FILE, FetchCounts, write_fetches
from gateway.stats.node_stats import NodeStats, node_metrics, node_stats


def told(run_dir: Path, trouble: str = "silent") -> None:
    way = WayTold("nixl", "it is sooner", 1.0, 2.0)
    write_nodes(run_dir, NodesTold("node-a", (NodeTold("node-b", "10.0.0.2:7710", trouble=trouble, way=way, losses=3),)))


def counted(run_dir: Path) -> None:
    counts = FetchCounts()
    counts.add([100, 100, 50], {}, 0.5)
    counts.add([100], {"changed": 2, "no_room": 0}, 0.25)
    counts.add([], {"silent": 3, "changed": 1}, 3.0)
    write_fetches(run_dir, {"node-b": counts, "node-c": FetchCounts()})


def test_a_node_that_is_not_heard_says_why_and_how_often_it_fell_silent(tmp_path: Path) -> None:
    told(tmp_path)
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
        "fetches": 0,
        "fetched_blocks": 0,
        "fetched_bytes": 0,
        "fetch_seconds": 0.0,
        "failed_blocks": {},
    }
    assert node_stats(tmp_path / "nowhere") == []


def test_what_came_from_a_node_is_counted_and_what_did_not_by_its_reason(tmp_path: Path) -> None:
    told(tmp_path)
    counted(tmp_path)
    (node,) = node_stats(tmp_path)
    assert (node.fetches, node.fetched_blocks, node.fetched_bytes, node.fetch_seconds) == (3, 4, 350, 3.75)
    assert node.failed_blocks == {"changed": 3, "silent": 3}


def test_counts_of_another_release_count_as_none(tmp_path: Path) -> None:
    told(tmp_path)
    (tmp_path / FETCHES_FILE).write_text('{"node-b": {"fetches": "many"}}')
    assert node_stats(tmp_path)[0].fetches == 0


def test_metrics_have_a_label_for_the_node(tmp_path: Path) -> None:
    told(tmp_path, trouble="")
    counted(tmp_path)
    text = _rendered(node_stats(tmp_path))
    assert 'peerkv_node_heard{node="node-b"} 1.0' in text
    assert 'peerkv_node_network_bytes_per_second{node="node-b",transport="nixl"} 2.0' in text
    assert 'peerkv_node_losses_total{node="node-b"} 3.0' in text
    assert 'peerkv_node_fetches_total{node="node-b"} 3.0' in text
    assert 'peerkv_node_fetched_blocks_total{node="node-b"} 4.0' in text
    assert 'peerkv_node_fetched_bytes_total{node="node-b"} 350.0' in text
    assert 'peerkv_node_fetch_seconds_total{node="node-b"} 3.75' in text
    assert 'peerkv_node_failed_blocks_total{node="node-b",reason="silent"} 3.0' in text


def _rendered(nodes: list[NodeStats]) -> str:
    class Nodes(Collector):
        def collect(self) -> list[Metric]:
            return list(node_metrics(nodes))

    registry = CollectorRegistry()
    registry.register(Nodes())
    return generate_latest(registry).decode()
