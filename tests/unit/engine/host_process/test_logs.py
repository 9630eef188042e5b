"""What is said of a log that could not be written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.host_process.logs import full_disk, open_log, rotate_open


def test_a_log_without_room_is_the_cause_of_an_end_that_nothing_was_logged_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "replica-0.log"
    assert full_disk(log) == ""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0))
    assert full_disk(log) == f"{tmp_path} is full, so nothing was logged"


def test_a_rotated_log_is_as_private_as_the_log(tmp_path: Path) -> None:
    log = tmp_path / "replica-0.log"
    open_log(log).close()
    log.write_bytes(b"a line\n")
    rotate_open(log, 3)
    assert [path.stat().st_mode & 0o777 for path in (log, tmp_path / "replica-0.log.1")] == [0o600, 0o600]
    assert (log.read_bytes(), (tmp_path / "replica-0.log.1").read_bytes()) == (b"", b"a line\n")
