"""The process of the frame tiers beside the replicas: started, restarted, and ended with them."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from engine.frame_tiers.client import TierClient
from engine.frame_tiers.config import VARIABLE, decode_config
from engine.frame_tiers.messages import SOCKET
from engine.replicas.launch import WAY_DOWN_BYTES, WAY_DOWN_BYTES_OF_GPU, EngineSettings, LaunchRefused, plan_launches
from engine.replicas.tier_process import BACKOFF_SECONDS_MAX, HEALTHY_SECONDS, TierProcess
from tests.unit.engine.replicas.test_supervisor import alive, all_ready, running, settings_in, until


def settings(home: Path, **about) -> EngineSettings:
    return replace(settings_in(home), disk=home / "disk", disk_bytes=1 << 20, **about)


async def answering(socket: Path, *, but: int = 0) -> int:
    """Wait until a process other than `but` answers on the socket; return its id."""
    client = TierClient(socket)
    task = asyncio.create_task(client.run())
    try:
        await until(lambda: client.latest is not None and client.latest.pid != but)
        assert client.latest is not None
        return client.latest.pid
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_it_runs_beside_the_replicas_is_started_again_and_ends_with_them(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("engine.replicas.tier_process.BACKOFF_SECONDS_MIN", 0.01)
    socket = tmp_path / "run" / SOCKET
    async with running(settings(tmp_path)) as supervisor:
        await all_ready(supervisor)
        first = await answering(socket)
        os.kill(first, signal.SIGKILL)
        second = await answering(socket, but=first)
        assert not alive(first)
        assert len(await all_ready(supervisor)) == 2
    await until(lambda: not alive(second))
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "disk").exists()


async def test_it_ends_with_a_host_that_is_killed(tmp_path: Path) -> None:
    async with running(settings(tmp_path)) as supervisor:
        await all_ready(supervisor)
        former = await answering(tmp_path / "run" / SOCKET)
        host = supervisor._link.pid
        os.kill(host, signal.SIGKILL)
        await until(lambda: supervisor._link is not None and supervisor._link.pid != host)
        await all_ready(supervisor)
        assert await answering(tmp_path / "run" / SOCKET, but=former)
        assert not alive(former)


def test_its_configuration_stands_in_its_environment_alone(tmp_path: Path) -> None:
    process = TierProcess(settings(tmp_path, vault="valkey://:s3cret@h"), {"PATH": "/bin"})
    spawn = process.spawn(0.0)
    assert "s3cret" not in " ".join(spawn.argv)
    told = decode_config(spawn.env[VARIABLE])
    assert (told.disk, told.vault, told.socket) == (str(tmp_path / "disk"), "valkey://:s3cret@h", spawn.socket)
    assert "s3cret" not in repr(process.settings)


def test_one_that_keeps_ending_is_started_less_and_less_often(tmp_path: Path) -> None:
    process = TierProcess(settings(tmp_path), {})
    waits = []
    for _ in range(10):
        process.spawn(0.0)
        waits.append(process.ended(1.0))
    assert waits[:3] == [1.0, 2.0, 4.0]
    assert waits[-1] == BACKOFF_SECONDS_MAX
    process.spawn(0.0)
    assert process.ended(HEALTHY_SECONDS) == 1.0


def test_host_memory_is_the_way_down_also_where_none_is_asked_for(tmp_path: Path) -> None:
    assert settings(tmp_path).host_memory_bytes_each == WAY_DOWN_BYTES
    assert settings(tmp_path, devices=("0", "1")).host_memory_bytes_each == WAY_DOWN_BYTES_OF_GPU
    assert settings(tmp_path, host_memory=1 << 30).host_memory_bytes_each == 1 << 29
    assert settings(tmp_path, connector=False).host_memory_bytes_each == 0
    assert settings_in(tmp_path).host_memory_bytes_each == 0


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"vault": "vault.lan:6379"}, "not like valkey://"),
        ({"tier_secret_file": Path("/absent")}, "cannot be read"),
        ({"vault": "valkey://h", "vault_password_file": Path("/absent")}, "cannot be used"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path: Path, about: dict, said: str) -> None:
    with pytest.raises(LaunchRefused, match=said):
        plan_launches(settings(tmp_path, **about), {}, 2)
