"""`peerkv serve` with a keys file that changes while clients send: no request is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gateway.cli.main import main
from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_run import COMPLETION, Process, peerkv

START_SECONDS_MAX = 90.0
CLIENTS = 16
CHANGES = 6


def keys(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> str:
    """What a command prints."""
    capsys.readouterr()
    assert main(["keys", *arguments, "--keys-file", str(path)]) == 0
    return capsys.readouterr().out.strip()


async def status_of(gateway: Process, key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    body = COMPLETION | {"fake": {"token_delay": 0.002}}
    async with gateway.session.post(gateway.url + "/v1/completions", json=body, headers=headers) as answer:
        await answer.read()
        return answer.status


async def test_keys_that_are_replaced_under_load_lose_no_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.upper().startswith("PEERKV_")]:
        monkeypatch.delenv(name)
    path = tmp_path / "keys.toml"
    newest = keys(capsys, path, "add", "alice")
    first, statuses, done = newest, [], False

    async with peerkv(tmp_path, PEERKV_KEYS_FILE=str(path)) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)

        async def client() -> None:
            while not done:
                statuses.append(await status_of(gateway, newest))

        async def taken(key: str) -> bool:
            return await status_of(gateway, key) == 200

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        for number in range(CHANGES):
            fresh = keys(capsys, path, "rotate", "alice", "--grace", "1h")
            if number == 0:
                gateway.signal(signal.SIGHUP)
            if number == 1:
                intact = path.read_bytes()
                path.write_text("half a fi")
                await until(lambda: any("is not TOML" in line for line in gateway.err))
                path.write_bytes(intact)
            await until(lambda fresh=fresh: taken(fresh))
            newest = fresh
        done = True
        await asyncio.gather(*clients)
        assert await status_of(gateway, first) == 401
        keys(capsys, path, "revoke", "alice")
        gateway.signal(signal.SIGHUP)

        async def refused() -> bool:
            return await status_of(gateway, newest) == 401

        await until(refused)
        assert len(statuses) > CLIENTS
        assert set(statuses) == {200}
        assert sum("is not TOML" in line for line in gateway.err) == 1


async def test_a_keys_file_that_cannot_be_used_is_an_error_at_the_start(tmp_path: Path) -> None:
    async with peerkv(tmp_path, PEERKV_KEYS_FILE=str(tmp_path / "none.toml")) as gateway:
        assert await gateway.ended() == 1
        assert "peerkv keys add NAME" in "".join(gateway.err)
