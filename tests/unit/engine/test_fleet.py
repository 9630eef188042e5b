from dataclasses import replace
from pathlib import Path

import pytest

from engine.fleet import (
    FLEET_FILE,
    FileFleet,
    FleetError,
    FleetSnapshot,
    Replica,
    ReplicaState,
    decode_fleet,
    encode_fleet,
    write_fleet,
)

ZERO = Replica("replica-0", ReplicaState.READY, "/run/r0.sock", 7, 0, "", "cuda:0,1", "/log/r0.log")
ONE = Replica("replica-1", ReplicaState.BACKOFF, "/run/r1.sock", None, 3, "killed by SIGKILL", "cpu", "/log/r1.log")
FLEET = FleetSnapshot(5, "/models/m", "m", "/dev/shm/t", (ZERO, ONE))


def test_a_fleet_survives_its_encoding() -> None:
    assert decode_fleet(encode_fleet(FLEET)) == FLEET


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"[]", encode_fleet(FLEET)[:-9], encode_fleet(FLEET).replace(b"backoff", b"bored")]
)
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(FleetError):
        decode_fleet(raw)


def test_only_ready_replicas_take_requests() -> None:
    assert FLEET.ready() == (ZERO,)


def test_a_replica_is_found_by_its_name() -> None:
    assert FLEET.find("replica-1") is ONE
    assert FLEET.find("replica-2") is None


def test_a_file_fleet_follows_the_file(tmp_path: Path) -> None:
    fleet = FileFleet(tmp_path)
    assert fleet.snapshot().replicas == ()
    write_fleet(tmp_path, FLEET)
    assert fleet.snapshot() == FLEET
    newer = replace(FLEET, version=6, replicas=(ZERO, replace(ONE, state=ReplicaState.STARTING)))
    write_fleet(tmp_path, newer)
    assert fleet.snapshot() == newer


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    fleet = FileFleet(tmp_path)
    write_fleet(tmp_path, FLEET)
    assert fleet.snapshot() is fleet.snapshot()


def test_a_fleet_that_is_held_follows_the_file_a_moment_later_and_at_once_after_a_failure(tmp_path: Path) -> None:
    now = [100.0]
    fleet = FileFleet(tmp_path, hold_seconds=1.0, clock=lambda: now[0])
    write_fleet(tmp_path, FLEET)
    assert fleet.snapshot() == FLEET
    newer = replace(FLEET, version=6, replicas=(replace(ZERO, state=ReplicaState.BACKOFF), ONE))
    write_fleet(tmp_path, newer)
    now[0] += 0.9
    assert fleet.snapshot() == FLEET
    fleet.suspect("replica-0")
    assert fleet.snapshot() == newer
    write_fleet(tmp_path, FLEET)
    assert fleet.snapshot() == newer
    now[0] += 1.0
    assert fleet.snapshot() == FLEET


def test_a_removed_file_means_no_replicas(tmp_path: Path) -> None:
    fleet = FileFleet(tmp_path)
    write_fleet(tmp_path, FLEET)
    fleet.snapshot()
    (tmp_path / FLEET_FILE).unlink()
    assert fleet.snapshot() == replace(FLEET, replicas=())
    write_fleet(tmp_path, FLEET)
    assert fleet.snapshot() == FLEET


def test_writing_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    write_fleet(tmp_path, FLEET)
    write_fleet(tmp_path, FLEET)
    assert [p.name for p in tmp_path.iterdir()] == [FLEET_FILE]


async def test_a_replica_of_a_file_is_drained_here_alone_until_another_process_serves(tmp_path: Path) -> None:
    fleet, other = FileFleet(tmp_path), FileFleet(tmp_path)
    write_fleet(tmp_path, FLEET)
    await fleet.drain("replica-0")
    drained = fleet.snapshot().find("replica-0")
    assert drained is not None
    assert (drained.state, fleet.snapshot().ready(), other.snapshot().ready()) == (ReplicaState.DRAINING, (), (ZERO,))
    assert fleet.snapshot().version > FLEET.version
    await fleet.resume("replica-0")
    assert fleet.snapshot().ready() == (ZERO,)
    await fleet.drain("replica-0")
    write_fleet(tmp_path, replace(FLEET, version=6))
    assert fleet.snapshot().ready() == ()
    again = replace(ZERO, pid=8)
    write_fleet(tmp_path, replace(FLEET, version=7, replicas=(again, ONE)))
    assert fleet.snapshot().ready() == (again,)


async def test_replicas_of_a_file_are_not_restarted_from_here(tmp_path: Path) -> None:
    fleet = FileFleet(tmp_path)
    write_fleet(tmp_path, FLEET)
    with pytest.raises(FleetError, match="replica-0 is run by `peerkv engine` elsewhere"):
        await fleet.restart("replica-0")
    with pytest.raises(FleetError, match="there is no replica 'nobody'"):
        await fleet.drain("nobody")
