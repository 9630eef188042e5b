"""The systemd unit: its command and variables are peerkv's, and systemd knows its keys."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.host_process.host import SHUTDOWN_SECONDS_MAX
from gateway.cli.main import build_parser
from gateway.settings import Settings, load
from tests.unit.packaging.files import DOCKER

UNIT = (DOCKER / "systemd/peerkv.service").read_text()


def values(key: str) -> list[str]:
    return re.findall(rf"(?m)^{key}=(.*)$", UNIT)


def test_its_command_is_one_that_peerkv_knows() -> None:
    program, *arguments = values("ExecStart")[0].split()
    assert program.endswith("/peerkv")
    assert callable(build_parser().parse_args(arguments).run)


def test_its_environment_is_of_known_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variables = dict(pair.split("=", 1) for line in values("Environment") for pair in line.split())
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("%", str(tmp_path / "x")))
    assert load().run_dir.name == "main"
    (credential,) = values("LoadCredential")
    assert credential.startswith("peerkv:"), "its files become peerkv_<name>, as peerkv looks for them"
    assert variables["PEERKV_SECRETS_DIR"] == "%d"


def test_a_stop_waits_for_the_drain_and_the_end_of_the_replicas() -> None:
    settings = Settings()
    assert int(values("TimeoutStopSec")[0]) > settings.drain_seconds + settings.terminate_seconds + SHUTDOWN_SECONDS_MAX


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd")
def test_systemd_accepts_it(tmp_path: Path) -> None:
    program = values("ExecStart")[0].split()[0]
    unit = tmp_path / "peerkv.service"
    unit.write_text(UNIT.replace(program, shutil.which("true") or program))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
