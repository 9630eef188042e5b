"""`--request-log` of a running gateway: its last lines survive the stop, and a path that cannot be written stops the start."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.unit.gateway.serve.test_run import peerkv


@pytest.mark.parametrize("target", ["file", "standard output"])
async def test_the_last_request_before_the_stop_is_logged(tmp_path: Path, target: str) -> None:
    log = tmp_path / "requests.jsonl"
    async with peerkv(tmp_path, "--request-log", str(log) if target == "file" else "-") as gateway:
        await gateway.ready()
        assert (await gateway.complete())[0] == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
    lines = log.read_text().splitlines() if target == "file" else gateway.out
    (line,) = map(json.loads, lines)  # what the gateway has to say else went to standard error
    assert (line["endpoint"], line["status"], line["tenant"], line["completion_tokens"]) == ("completions", 200, "anonymous", 3)


async def test_a_path_that_cannot_be_written_is_said_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "requests.jsonl"
    async with peerkv(tmp_path, "--request-log", str(path)) as gateway:
        assert await gateway.ended() == 1
        (line,) = gateway.err
    assert line.startswith(f"peerkv: error: request_log: cannot write {path}: No such file or directory.")
    assert not (tmp_path / "run").exists()
