"""A node's own replicas, and those of the nodes that its agent hears, as one fleet."""

from pathlib import Path

import pytest

from engine.fleet import FileFleet as OwnFleet
from engine.fleet import FleetError, FleetSnapshot, Replica, ReplicaState, write_fleet
from engine.joined_fleet import JoinedFleet, NodesTold, NodeTold, WayTold, went_with_its_node, write_nodes
from transport.node.messages import FleetTold, ReplicaTold

THEIRS = FleetTold(
    "/models/m", "m", (), (ReplicaTold("replica-0", "ready", 2, "", "cpu"), ReplicaTold("replica-1", "starting"))
)


def own(path: Path, *args: str) -> OwnFleet:
    replica = Replica("replica-0", ReplicaState.READY, "/run/r0", 7, 0, "", "cpu", "")
    write_fleet(path, FleetSnapshot(3, "/other/m", "m", "/tables", (replica,), 0, args))
    return OwnFleet(path)


def told(path: Path, fleet: FleetTold | None, *names: str) -> None:
    sockets = {name: f"/run/node-b.{name}.sock" for name in names}
    write_nodes(path, NodesTold("node-a", (NodeTold("node-b", "10.0.0.2:7710", fleet, sockets),)))


def test_other_nodes_replicas_join_in_with_a_socket_here(tmp_path: Path) -> None:
    told(tmp_path, THEIRS, "replica-0", "replica-1")
    snapshot = JoinedFleet(own(tmp_path), tmp_path).snapshot()
    assert [(replica.name, replica.state.value, replica.socket) for replica in snapshot.replicas] == [
        ("replica-0", "ready", "/run/r0"),
        ("node-b:replica-0", "ready", "/run/node-b.replica-0.sock"),
        ("node-b:replica-1", "starting", "/run/node-b.replica-1.sock"),
    ]
    assert (snapshot.node, snapshot.replicas[1].restarts) == ("node-a", 2)


def test_it_tells_how_fast_blocks_come_from_the_fastest_node_that_is_heard_and_serves_the_same(tmp_path: Path) -> None:
    assert JoinedFleet(own(tmp_path), tmp_path).snapshot().network_bytes_per_second == 0
    another = FleetTold("/models/m", "another", (), THEIRS.replicas)
    heard = [
        (THEIRS, WayTold("tcp", "", 2e9, 0.0)),
        (THEIRS, WayTold("nixl", "", 1e9, 40e9)),
        (THEIRS, WayTold("tcp", "", 0.0, 50e9)),  # NIXL, which is not in use
        (another, WayTold("nixl", "", 1e9, 60e9)),
        (None, WayTold("nixl", "", 1e9, 70e9)),
    ]
    nodes = [NodeTold(f"node-{number}", "10.0.0.2:7710", fleet, way=way) for number, (fleet, way) in enumerate(heard)]
    for told, fastest in ((nodes, 40e9), (nodes[:1], 2e9), (nodes[3:], 0.0), ([], 0.0)):
        write_nodes(tmp_path, NodesTold("node-a", tuple(told)))
        assert JoinedFleet(own(tmp_path), tmp_path).snapshot().network_bytes_per_second == fastest


def test_a_node_that_is_not_heard_or_serves_something_else_has_none(tmp_path: Path) -> None:
    fleet = own(tmp_path, "--max-model-len", "100")
    for theirs in (None, THEIRS, FleetTold("m", "another", ("--max-model-len", "100"), THEIRS.replicas)):
        told(tmp_path, theirs, "replica-0")
        assert len(JoinedFleet(fleet, tmp_path).snapshot().replicas) == 1


def test_each_change_makes_another_version_and_none_the_same_object(tmp_path: Path) -> None:
    now = 0.0
    joined = JoinedFleet(own(tmp_path), tmp_path, clock=lambda: now)
    alone = joined.snapshot()
    assert alone.node == ""
    told(tmp_path, THEIRS, "replica-0")
    assert joined.snapshot() is alone  # it is not looked at that often
    now = 1.0
    both = joined.snapshot()
    assert len(both.replicas) == 2
    now = 2.0
    assert joined.snapshot() is both
    told(tmp_path, None)
    now = 3.0
    assert len(joined.snapshot().replicas) == 1
    assert joined.snapshot().version > both.version
    (tmp_path / "nodes.json").write_text("garbage")
    now = 4.0
    assert len(joined.snapshot().replicas) == 1


def test_a_replica_that_went_with_its_node_is_told_from_one_that_ended(tmp_path: Path) -> None:
    fleet = own(tmp_path)
    told(tmp_path, THEIRS, "replica-0")
    both = JoinedFleet(fleet, tmp_path).snapshot()
    assert not went_with_its_node(both, "node-b:replica-0")
    told(tmp_path, None)
    alone = JoinedFleet(fleet, tmp_path).snapshot()
    assert went_with_its_node(alone, "node-b:replica-0")
    assert not went_with_its_node(alone, "replica-7")


async def test_other_nodes_replicas_are_not_ours_to_drain(tmp_path: Path) -> None:
    joined = JoinedFleet(own(tmp_path), tmp_path)
    for change in (joined.drain, joined.resume, joined.restart):
        with pytest.raises(FleetError, match="is another node's"):
            await change("node-b:replica-0")
    joined.suspect("node-b:replica-0")
    joined.suspect("replica-0")
