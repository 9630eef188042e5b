"""What the doctor says of other nodes."""

import pytest

from engine.fleet import FleetSnapshot
from engine.joined_fleet import NodesTold, NodeTold, WayTold
from engine.node.fetch_counts import FetchCounts
from gateway.cli.doctor.other_nodes import ALONE, judge_nodes, node_lines, seen
from transport.node.messages import FleetTold, ReplicaTold

OWN = FleetSnapshot(1, "/m", "m", "/t", ())
FLEET = FleetTold("/m", "m", (), (ReplicaTold("replica-0", "ready"), ReplicaTold("replica-1", "starting")))


def test_nodes_that_are_heard_are_listed_without_a_finding() -> None:
    found = seen(NodesTold("node-a", (NodeTold("node-b", "10.0.0.2:7710", FLEET),)), OWN, {})
    assert list(node_lines(found)) == [
        "Other nodes, which call this one node-a",
        "  node-b   10.0.0.2:7710, 1 of 2 replicas ready, blocks come by TCP",
    ]
    assert list(judge_nodes(found)) == []


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (WayTold("tcp", "here: NIXL is not installed"), "blocks come by TCP (here: NIXL is not installed)"),
        (WayTold("tcp", "NIXL failed: gone"), "blocks come by TCP (NIXL failed: gone)"),
        (
            WayTold("nixl", "it is sooner", 1.26e9, 2.31e10),
            "blocks come by NIXL, unencrypted (it is sooner; measured 1.3 GB/s by TCP and 23.1 GB/s by NIXL)",
        ),
    ],
)
def test_how_a_nodes_blocks_come_is_told_with_the_reason(way: WayTold, words: str) -> None:
    found = seen(NodesTold("node-a", (NodeTold("node-b", "10.0.0.2:7710", FLEET, way=way),)), OWN, {})
    assert list(node_lines(found))[1] == f"  node-b   10.0.0.2:7710, 1 of 2 replicas ready, {words}"


def test_what_came_from_a_node_is_told_once_something_was_asked_for() -> None:
    came = FetchCounts()
    came.add([5_000_000] * 3, {"changed": 2, "no_room": 1}, 0.25)
    found = seen(NodesTold("node-a", (NodeTold("node-b", "10.0.0.2:7710", FLEET),)), OWN, {"node-b": came})
    words = "3 blocks of it came, 15.0 MB in 0.2 s; others did not: 2 changed, 1 no room"
    assert list(node_lines(found))[2] == f"    {words}"


def test_what_keeps_nodes_apart_is_told_with_what_to_do() -> None:
    nodes = (
        NodeTold("node-b", "10.0.0.2:7710", trouble="10.0.0.2:7710 does not answer"),
        NodeTold("node-c", "10.0.0.3:7710", FleetTold("/n", "n")),
    )
    found = list(judge_nodes(seen(NodesTold("node-a", nodes, "valkey://h:1/0: no connection"), OWN, {})))
    assert [finding.what for finding in found] == [
        "node-b is not heard: 10.0.0.2:7710 does not answer",
        "node-c takes none of our requests: served model: m here, n there",
        "no new nodes are found: valkey://h:1/0: no connection",
    ]
    assert all(finding.problem and finding.remedy for finding in found)


def test_a_node_alone_says_nothing() -> None:
    assert list(node_lines(ALONE)) == list(judge_nodes(ALONE)) == []
