"""`peerkv replicas` against a running `peerkv serve`: every replica restarted while clients send, and no request is lost."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from tests.unit.gateway.serve.test_keys_under_load import START_SECONDS_MAX
from tests.unit.gateway.serve.test_run import Process, peerkv

CLIENTS = 8
COMMAND_SECONDS_MAX = 90.0


async def replicas(gateway: Process, *arguments: str) -> tuple[int, str]:
    """Status and output of `peerkv replicas` with these arguments."""
    command = [sys.executable, "-m", "gateway.cli", "replicas", *arguments, "--url", gateway.url]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    async with asyncio.timeout(COMMAND_SECONDS_MAX):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def listed(gateway: Process) -> dict[str, dict[str, Any]]:
    _, output = await replicas(gateway, "list", "--json")
    return {each["name"]: each for each in json.loads(output)["replicas"]}


async def test_all_replicas_are_restarted_under_load_and_no_request_fails(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        before, outcomes, done = set(gateway.engines()), [], False

        async def client(number: int) -> None:
            while not done:
                streamed = number % 2 == 0
                status, text = await gateway.complete(stream=streamed, fake={"token_delay": 0.05})
                outcomes.append((status, "error" in text, not streamed or text.endswith("data: [DONE]\n\n")))

        clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
        status, output = await replicas(gateway, "restart", "--all")
        done = True
        await asyncio.gather(*clients)
        assert status == 0, output
        assert "replica-0: ready again after" in output
        assert "replica-1: ready again after" in output
        assert before.isdisjoint(gateway.engines())
        assert {each["restarts"] for each in (await listed(gateway)).values()} == {1}
        assert len(outcomes) > CLIENTS
        assert set(outcomes) == {(200, False, True)}


async def test_one_replica_is_drained_and_resumed_and_the_last_one_is_not_restarted(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        assert (await replicas(gateway, "drain", "replica-0"))[0] == 0
        assert (await listed(gateway))["replica-0"]["state"] == "draining"
        status, output = await replicas(gateway, "restart", "replica-1")
        assert (status, "No other replica than replica-1 is ready" in output) == (1, True)
        status, output = await replicas(gateway, "drain", "replica-1")
        assert (status, "No other replica than replica-1 is ready" in output) == (1, True)
        assert (await gateway.complete())[0] == 200
        assert (await replicas(gateway, "drain", "replica-1", "--force"))[0] == 0
        assert (await gateway.complete())[0] == 503
        assert (await replicas(gateway, "resume", "replica-1"))[0] == 0
        assert (await replicas(gateway, "resume", "replica-0"))[0] == 0
        assert (await listed(gateway))["replica-0"]["state"] == "ready"
        status, output = await replicas(gateway, "drain", "nobody")
        assert (status, "nobody" in output) == (1, True)


async def test_what_an_engine_elsewhere_runs_is_drained_but_restarted_by_its_operator(tmp_path: Path) -> None:
    async with peerkv(tmp_path, command="gateway") as gateway, peerkv(tmp_path, command="engine"):
        await gateway.ready(seconds=START_SECONDS_MAX)
        assert (await replicas(gateway, "drain", "replica-0"))[0] == 0
        for _ in range(4):
            assert (await gateway.complete())[0] == 200
        status, output = await replicas(gateway, "restart", "replica-0")
        assert (status, "have its operator restart it" in output) == (1, True)
