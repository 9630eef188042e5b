"""The fleet and the tables of a moment ago."""

from collections.abc import Mapping
from pathlib import Path

from engine.fleet import FileFleet, ReplicaState, write_fleet
from gateway.block_registry.recent import RECENT_SECONDS, RecentFleet, RecentTables
from gateway.block_registry.tables import Table
from tests.unit.transport.replica_tables import StandingFleet, replica_tables
from transport.table.directory import TableDirectory


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_change_of_the_fleet_is_seen_a_moment_later_and_at_once_after_a_failure(tmp_path: Path) -> None:
    standing, clock = StandingFleet("replica-0"), Clock()
    write_fleet(tmp_path, standing.snapshot())
    recent = RecentFleet(FileFleet(tmp_path), clock)
    assert recent.snapshot().ready()
    standing.set("replica-0", ReplicaState.BACKOFF)
    write_fleet(tmp_path, standing.snapshot())
    clock.now += RECENT_SECONDS / 2
    assert recent.snapshot().ready()
    recent.suspect("replica-0")
    assert not recent.snapshot().ready()
    standing.set("replica-0", ReplicaState.READY)
    write_fleet(tmp_path, standing.snapshot())
    assert not recent.snapshot().ready()
    clock.now += RECENT_SECONDS
    assert recent.snapshot().ready()


def test_a_dead_owners_table_is_gone_a_moment_later(tmp_path: Path) -> None:
    clock = Clock()
    with replica_tables(tmp_path) as replicas:
        replicas.start("replica-0")
        directory = TableDirectory(tmp_path)
        recent = RecentTables(directory, clock)

        def names() -> Mapping[str, Table]:
            return dict(recent.tables())

        assert list(names()) == ["replica-0"]
        replicas.stop("replica-0")
        assert list(names()) == ["replica-0"]
        clock.now += RECENT_SECONDS
        assert not names()
        directory.close()
