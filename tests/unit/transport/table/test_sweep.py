"""What a starting replica clears away from the directory of tables."""

import os
from pathlib import Path

import pytest

from tests.unit.transport.replica_tables import replica_tables
from transport.table.directory import DRAFT_SECONDS_MAX, sweep


def test_old_drafts_and_dead_tables_go_and_all_else_stays(tmp_path: Path) -> None:
    with replica_tables(tmp_path) as tables:
        tables.start("alive")
        for name in ("dead.table", ".replica-0.123.456", ".replica-0.124.457", ".peerkv-owned", "notes"):
            (tmp_path / name).write_bytes(b"x")
        now = os.stat(tmp_path / "notes").st_mtime + DRAFT_SECONDS_MAX + 1
        os.utime(tmp_path / ".replica-0.124.457", (now, now))
        assert sweep(tmp_path, now) == 2
        assert {entry.name for entry in tmp_path.iterdir()} == {"alive.table", ".replica-0.124.457", ".peerkv-owned", "notes"}


def test_what_goes_while_it_is_swept_is_nobodys_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas that start together sweep together, while the drafts of others become tables."""
    for number in range(8):
        for name in (f"dead-{number}.table", f".replica-0.{number}.456"):
            (tmp_path / name).write_bytes(b"x")

    def others_were_faster(fd: int) -> bool:
        for path in tmp_path.iterdir():
            path.unlink()
        return False

    monkeypatch.setattr("transport.table.liveness.claimed", others_were_faster)
    assert sweep(tmp_path, 0.0) == 0
