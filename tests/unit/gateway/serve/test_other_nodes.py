"""What the gateway's log says of an agent that ended, beside what the agent's own log can say."""

import asyncio
import logging
import os
import signal
from pathlib import Path

import pytest

from gateway.serve import other_nodes
from gateway.settings import Settings
from tests.unit.gateway.running_door import until


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
        ("raise SystemExit(0)", "ended with 0, {log} says why"),
        ("raise SystemExit(1)", "ended with 1, {log} says why"),
    ],
)
async def test_the_agents_log_is_named_where_it_says_why(
    end: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "agent_that_ends.py").write_text(end)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setattr(other_nodes, "AGENT", "agent_that_ends")
    settings = Settings(run_dir=tmp_path, log_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        keeping = asyncio.create_task(other_nodes._keep(b"{}\n", settings))
        await until(lambda: bool(caplog.messages))
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    said = words.format(log=tmp_path / other_nodes.LOG)
    assert caplog.messages[0] == f"the node's agent {said}; other nodes are not reached until it is started again"


async def test_an_agent_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(other_nodes, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(other_nodes, "AGENT", "no_such_module")
    logs = tmp_path / "logs"
    settings = Settings(run_dir=tmp_path, log_dir=logs)
    with caplog.at_level(logging.WARNING):
        keeping = asyncio.create_task(other_nodes._keep(b"{}\n", settings))
        await until(lambda: len(caplog.messages) == 2)
        assert all("the node's agent cannot be started: " in said and str(logs) in said for said in caplog.messages)
        logs.mkdir()
        await until(lambda: (logs / other_nodes.LOG).exists())
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


WRITES = """
import os, pathlib, time
place, count = pathlib.Path(os.environ["PLACE"]), 0
while True:
    count += 1
    (place / "fetches.json").write_text("{}")
    if count == 3:
        (place / "pid.new").write_text(str(os.getpid()))
        (place / "pid.new").rename(place / "pid")
    time.sleep(0.02)
"""


async def test_an_agent_that_is_stopped_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "agent_that_writes.py").write_text(WRITES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", ""))))
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setattr(other_nodes, "AGENT", "agent_that_writes")
    monkeypatch.setattr(other_nodes, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(other_nodes, "PAUSE_SECONDS", 0.01)
    settings, pid = Settings(run_dir=tmp_path, log_dir=tmp_path), tmp_path / "pid"
    with caplog.at_level(logging.WARNING):
        keeping = asyncio.create_task(other_nodes._keep(b"{}\n", settings))
        await until(pid.exists)
        await asyncio.sleep(12 * 0.2)
        assert not caplog.messages  # it writes, and is left alone
        first = int(pid.read_text())
        pid.unlink()
        os.kill(first, signal.SIGSTOP)
        await until(pid.exists)
        assert int(pid.read_text()) != first
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    assert caplog.messages[0] == "the node's agent is stopped, or stuck: it is killed"
    assert "was killed by SIGKILL" in caplog.messages[1]


def test_a_signal_without_a_name_has_its_number() -> None:
    assert signal.SIGRTMIN + 1 not in set(signal.Signals)
    assert other_nodes._ending(-(signal.SIGRTMIN + 1), Path("/l")) == f"was killed by signal {signal.SIGRTMIN + 1}"
