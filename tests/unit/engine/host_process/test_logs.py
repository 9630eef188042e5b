"""What is said of a log that could not be written."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.host_process.logs import full_disk


def test_a_log_without_room_is_the_cause_of_an_end_that_nothing_was_logged_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "replica-0.log"
    assert full_disk(log) == ""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=0))
    assert full_disk(log) == f"{tmp_path} is full, so nothing was logged"
