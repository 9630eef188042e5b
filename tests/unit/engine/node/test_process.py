"""The agent as a process: it ends with its stdin, and clears up behind itself."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from engine.joined_fleet import NODES_FILE
from engine.node.settings import NodeSettings, Peer
from tests.unit.engine.node.two_nodes import free_port
from tests.unit.waiting import until

SECONDS_MAX = 30.0


@pytest.mark.parametrize("by_stdin", [True, False], ids=["stdin", "signal"])
async def test_what_it_told_of_other_nodes_goes_with_it(tmp_path: Path, by_stdin: bool) -> None:
    settings = NodeSettings(
        name="node-a",
        host="127.0.0.1",
        port=free_port(),
        table_dir=str(tmp_path / "tables"),
        run_dir=str(tmp_path),
        peers=(Peer("node-b", "127.0.0.1", free_port()),),
        join="",
        keys="",
        staging_bytes=16 << 20,
        release="test",
    )
    (tmp_path / "tables").mkdir(mode=0o700)
    argv = [sys.executable, "-m", "engine.node"]
    with (tmp_path / "node.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*argv, stdin=asyncio.subprocess.PIPE, stderr=log, env=dict(os.environ))
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(settings) + b"\n")
    until((tmp_path / NODES_FILE).exists)
    if by_stdin:
        process.stdin.close()
    else:
        process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), SECONDS_MAX) == 0
    assert not (tmp_path / NODES_FILE).exists()
    reason = "its stdin ended" if by_stdin else "SIGTERM came"
    assert (tmp_path / "node.log").read_text().count(f"the node's agent ends: {reason}") == 1
