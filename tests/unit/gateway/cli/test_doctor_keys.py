"""What the doctor says of the files that keep keys, and what was used of their limits."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.cli.doctor import machine
from gateway.cli.doctor.findings import judge
from gateway.settings import Settings
from tests.unit.gateway.cli.test_doctor import CPU_MACHINE


def test_a_keys_file_that_others_may_read_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("")
    path.chmod(0o640)
    assert machine.look(Settings(keys_file=path)).keys_file_open == str(path)
    path.chmod(0o600)
    assert machine.look(Settings(keys_file=path)).keys_file_open == ""
    [problem] = [each for each in judge(replace(CPU_MACHINE, keys_file_open="/k.toml"), None, ()) if "/k.toml" in each.what]
    assert problem.problem
    assert problem.remedy == "chmod 600 /k.toml"


def test_a_limits_file_that_could_not_be_written_is_a_problem_where_there_are_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    settings = Settings(limits_file=locked / "limits.json")
    assert machine.look(settings).unwritable == ()
    with_keys = settings.model_copy(update={"keys_file": tmp_path / "keys.toml"})
    assert machine.look(with_keys).unwritable == (("limits_file", str(locked)),)
