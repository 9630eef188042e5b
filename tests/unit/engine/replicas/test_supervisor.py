import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from engine.fleet import FileFleet, FleetError, FleetView, Replica, ReplicaState
from engine.host_process import processes
from engine.replicas.launch import EngineSettings
from engine.replicas.member import narrate
from engine.replicas.supervisor import Supervisor

ROOT = Path(__file__).resolve().parents[4]
FAKE = (sys.executable, str(ROOT / "tests" / "fake_engine.py"))
DEADLINE_SECONDS = 30.0


def settings_in(home: Path, *args: str) -> EngineSettings:
    """Two fake replicas with short times; their files lie in `home`."""
    return EngineSettings(
        model="fake/model",
        served_model_name="fake",
        run_dir=home / "run",
        table_dir=home / "table",
        log_dir=home / "log",
        vllm_args=args,
        launcher=FAKE,
        health_interval_seconds=0.2,
        health_timeout_seconds=1.0,
        health_failures_max=2,
        miss_seconds_apart=0.1,
        backoff_seconds_min=0.01,
        backoff_seconds_max=0.1,
        start_failures_max=2,
        terminate_seconds=2.0,
        claim_seconds_max=0.0,
    )


@asynccontextmanager
async def running(settings: EngineSettings, lines: list[str] | None = None) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(settings, (lines if lines is not None else []).append)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop(5.0)


async def all_ready(supervisor: Supervisor) -> tuple[Replica, ...]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return (await supervisor.wait_ready(2)).replicas


async def until(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, DEADLINE_SECONDS at most."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def alive(pid: int | None) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def host_of(replica: Replica) -> int:
    stat = Path(f"/proc/{replica.pid}/stat").read_text()
    return int(stat[stat.rindex(")") + 2 :].split()[1])


async def test_replicas_start_and_answer_on_their_sockets(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        for replica in await all_ready(supervisor):
            connector = aiohttp.UnixConnector(replica.socket)
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get("http://replica/v1/models") as answer,
            ):
                assert (await answer.json())["data"][0]["id"] == "fake"
            assert os.stat(replica.socket).st_mode & 0o077 == 0
        logs = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "log").iterdir()}
        assert logs == dict.fromkeys(("host.log", "replica-0.log", "replica-1.log"), 0o600)


async def test_a_killed_replica_comes_back_and_the_others_are_untouched(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        zero, one = await all_ready(supervisor)
        assert zero.pid is not None
        os.kill(zero.pid, signal.SIGKILL)
        await until(lambda: supervisor.snapshot().replicas[0].state is not ReplicaState.READY)
        assert supervisor.snapshot().ready() == (one,)
        again, same = await all_ready(supervisor)
        assert same == one
        assert (again.restarts, again.reason) == (1, "")
        assert again.pid != zero.pid


async def test_a_killed_host_takes_all_replicas_and_all_come_back(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        before = await all_ready(supervisor)
        host = host_of(before[0])
        os.kill(host, signal.SIGKILL)
        await until(lambda: not supervisor.snapshot().ready())
        await until(lambda: not any(alive(r.pid) for r in before))
        after = await all_ready(supervisor)
        assert {r.pid for r in after}.isdisjoint(r.pid for r in before)
        assert host_of(after[0]) == host_of(after[1]) != host


KILLED_PARENT = """
import asyncio, sys
from engine.replicas.supervisor import Supervisor
from tests.unit.engine.replicas.test_supervisor import settings_in, all_ready
from pathlib import Path

async def main():
    supervisor = Supervisor(settings_in(Path(sys.argv[1])))
    await supervisor.start()
    print(*(r.pid for r in await all_ready(supervisor)), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_PARENT, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(until(lambda: not any(alive(pid) for pid in pids)))
    asyncio.run(until(lambda: not (tmp_path / "run").exists() and not (tmp_path / "table").exists()))


async def test_stopping_leaves_nothing(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with running(settings) as supervisor:
        replicas = await all_ready(supervisor)
        host = host_of(replicas[0])
        (settings.table_dir / "replica-0.table").write_bytes(bytes(64))
    assert not any(alive(pid) for pid in (host, *(r.pid for r in replicas)))
    assert not settings.run_dir.exists()
    assert not settings.table_dir.exists()
    assert {r.state for r in supervisor.snapshot().replicas} == {ReplicaState.STOPPED}


async def test_a_replica_that_is_deaf_to_requests_is_killed_after_the_drain_time(tmp_path: Path) -> None:
    supervisor = Supervisor(settings_in(tmp_path, "--fake-deaf"))
    await supervisor.start()
    replicas = await all_ready(supervisor)
    began = time.monotonic()
    await supervisor.stop(0.3)
    assert 0.3 <= time.monotonic() - began < 5
    assert not any(alive(r.pid) for r in replicas)


async def test_a_second_stop_does_not_wait_for_the_first_ones_drain_time(tmp_path: Path) -> None:
    supervisor = Supervisor(settings_in(tmp_path, "--fake-deaf"))
    await supervisor.start()
    replicas = await all_ready(supervisor)
    slow = asyncio.create_task(supervisor.stop(500.0))
    await until(lambda: not supervisor.snapshot().ready())
    async with asyncio.timeout(DEADLINE_SECONDS):
        await supervisor.stop(0.0)
        await slow
    assert not any(alive(r.pid) for r in replicas)


async def test_stopping_at_once_after_the_start_leaves_nothing(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with running(settings):
        pass
    assert not settings.run_dir.exists()
    assert [p for p in processes.children(os.getpid()) if b"engine.host_process" in command_of(p)] == []


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def test_a_replica_that_cannot_start_is_given_up_with_the_reason_from_its_log(tmp_path: Path) -> None:
    lines: list[str] = []
    settings = settings_in(tmp_path, "--fake-exit-code", "3", "--fake-exit-on", "replica-1")
    async with running(settings, lines) as supervisor:
        await until(lambda: supervisor.snapshot().replicas[1].state is ReplicaState.FAILED)
        with pytest.raises(FleetError, match="replica-1: gave up after 2 failed starts: ended with status 3"):
            await supervisor.wait_ready(2)
        assert len((await supervisor.wait_ready(1)).ready()) == 1
    log_line = (tmp_path / "log" / "replica-1.log").read_text().splitlines()[-1]
    assert f"replica-1 | {log_line}" in lines


async def test_a_start_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    args = ("--fake-exit-code", "3", "--fake-exit-on", "replica-1", "--fake-exit-once", str(tmp_path / "once"))
    async with running(settings_in(tmp_path, *args)) as supervisor:
        zero, one = await all_ready(supervisor)
        assert (zero.restarts, one.restarts) == (0, 1)


async def test_a_replica_that_is_killed_or_drained_is_told_of_in_english(tmp_path: Path) -> None:
    lines: list[str] = []
    settings = replace(settings_in(tmp_path), backoff_seconds_min=0.5, backoff_seconds_max=0.5)
    async with running(settings, lines) as supervisor:
        zero, _ = await all_ready(supervisor)
        assert zero.pid is not None
        os.kill(zero.pid, signal.SIGKILL)
        await until(lambda: supervisor.snapshot().replicas[0].restarts == 1)
        await all_ready(supervisor)
        await supervisor.drain("replica-1")
    told = [line for line in lines if " ended" in line or "drain" in line]
    assert told == [
        "replica-0 ended: killed by SIGKILL; it starts again in 0.5 s",
        "replica-1 is drained: it gets no new requests",
    ]


def test_a_replica_that_waits_to_be_killed_is_told_of_once_it_is_gone() -> None:
    ready = Replica("r", ReplicaState.READY, "/s", 7, 0, "", "cpu", "/log")
    ending = replace(ready, state=ReplicaState.BACKOFF, reason="its engine has died")
    ended = replace(ending, pid=None, reason="its engine has died; killed by SIGKILL")
    assert list(narrate(ready, ending)) == []
    assert list(narrate(ending, ended, 30.0)) == ["r ended: its engine has died; killed by SIGKILL; it starts again in 30 s"]
    assert list(narrate(ready, replace(ready, state=ReplicaState.DRAINING, reason="stopping"))) == ["r is stopping"]


async def test_a_hung_replica_is_restarted(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        zero, one = await all_ready(supervisor)
        assert zero.pid is not None
        os.kill(zero.pid, signal.SIGSTOP)
        await until(lambda: supervisor.snapshot().replicas[0].state is not ReplicaState.READY)
        again, same = await all_ready(supervisor)
        assert (again.restarts, same) == (1, one)


async def test_a_suspected_replica_is_checked_at_once(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path), health_interval_seconds=3600.0, health_timeout_seconds=0.2)
    async with running(settings) as supervisor:
        zero, _ = await all_ready(supervisor)
        assert zero.pid is not None
        os.kill(zero.pid, signal.SIGSTOP)
        supervisor.suspect("replica-0")
        supervisor.suspect("nobody")
        await until(lambda: supervisor.snapshot().replicas[0].restarts == 1)


async def test_out_of_descriptors_no_replica_is_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checks fail for want of a descriptor of ours, which says nothing about the replicas."""
    async with running(settings_in(tmp_path)) as supervisor:
        before = await all_ready(supervisor)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(least_free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (least_free, hard))
        try:
            await until(lambda: caplog.text.count("could not be checked") >= 8)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert supervisor.snapshot().replicas == before


async def test_a_frozen_engine_is_restarted_although_its_server_answers(tmp_path: Path) -> None:
    settings = replace(settings_in(tmp_path, "--fake-core"), core_frozen_seconds_max=1.5)
    async with running(settings) as supervisor, aiohttp.ClientSession(connector=to(settings, "replica-0")) as session:
        zero, one = await all_ready(supervisor)
        async with session.get("http://replica/fake/seen") as answer:
            core = (await answer.json())["core"]
        body = {"prompt": "x", "max_tokens": 2, "fake": {"token_delay": 0.01}}
        async with session.post("http://replica/v1/completions", json=body) as answer:
            assert answer.status == 200
        os.kill(core, signal.SIGSTOP)
        await until(lambda: "made no step" in supervisor.snapshot().replicas[0].reason)
        os.kill(core, signal.SIGCONT)
        await until(lambda: not supervisor.snapshot().replicas[0].reason)
        assert supervisor.snapshot().replicas[0].pid == zero.pid
        os.kill(core, signal.SIGSTOP)
        await until(lambda: supervisor.snapshot().replicas[0].restarts == 1)
        again, same = await all_ready(supervisor)
        assert (again.pid != zero.pid, same) == (True, one)
        assert not alive(core)


def to(settings: EngineSettings, name: str) -> aiohttp.UnixConnector:
    return aiohttp.UnixConnector(str(settings.run_dir / f"{name}.sock"))


async def test_a_drained_replica_takes_nothing_new_until_it_is_restarted(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        zero, one = await all_ready(supervisor)
        await supervisor.drain("replica-0")
        assert supervisor.snapshot().ready() == (one,)
        assert alive(zero.pid)
        await supervisor.restart("replica-0")
        again, _ = await all_ready(supervisor)
        assert again.pid != zero.pid
        with pytest.raises(FleetError, match="there is no replica 'nobody'"):
            await supervisor.drain("nobody")


async def ask(replica: Replica, **fake: object) -> int:
    """The status of a completion of two tokens, sent to a replica itself."""
    body = {"prompt": "hello", "max_tokens": 2, "fake": fake}
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(replica.socket)) as session,
        session.post("http://replica/v1/completions", json=body) as answer,
    ):
        await answer.read()
        return answer.status


@pytest.mark.parametrize("tables", [(), ("--fake-core",)], ids=["by_metrics", "by_tables"])
async def test_draining_waits_for_requests_and_no_longer(tmp_path: Path, tables: tuple[str, ...]) -> None:
    async with running(settings_in(tmp_path, *tables)) as supervisor:
        zero, one = await all_ready(supervisor)
        slow = asyncio.create_task(ask(zero, token_delay=0.6))
        await until_running(zero)
        draining = asyncio.create_task(supervisor.drain_all(20.0))
        await until(lambda: not supervisor.snapshot().ready())
        assert {r.state for r in supervisor.snapshot().replicas} == {ReplicaState.DRAINING}
        assert await draining is True
        assert slow.done()
        assert await slow == 200
        assert alive(zero.pid)
        assert alive(one.pid)


async def test_draining_gives_up_after_its_time_and_a_resumed_replica_is_ready(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        zero, _ = await all_ready(supervisor)
        slow = asyncio.create_task(ask(zero, delay=60))
        await until_running(zero)
        await supervisor.drain("replica-0")
        assert await supervisor.idle_in("replica-0", 0.2) is False
        await supervisor.resume("replica-0")
        assert len(supervisor.snapshot().ready()) == 2
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)


async def running_requests(replica: Replica) -> int:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(replica.socket)) as session,
        session.get("http://replica/fake/seen") as answer,
    ):
        seen = await answer.json()
        return int(seen["running"])


async def until_running(replica: Replica) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not await running_requests(replica):
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def test_directories_in_use_are_refused(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path)) as supervisor:
        with pytest.raises(FleetError, match="in use by another running peerkv"):
            await Supervisor(settings_in(tmp_path)).start()
        await all_ready(supervisor)


async def test_a_host_that_cannot_run_is_given_up_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "msgspec.py").write_text("raise ImportError('no such thing here')\n")
    environ = os.environ | {"PYTHONPATH": f"{tmp_path / 'broken'}:{ROOT}"}
    supervisor = Supervisor(settings_in(tmp_path), environ=environ)
    await supervisor.start()
    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(FleetError, match="ImportError: no such thing here"):
            await supervisor.wait_ready()
    await supervisor.stop(1.0)


@pytest.mark.parametrize("kind", ["supervisor", "file"])
async def test_every_view_shows_the_same_fleet(tmp_path: Path, kind: str) -> None:
    settings = settings_in(tmp_path)
    async with running(settings) as supervisor:
        view: FleetView = supervisor if kind == "supervisor" else FileFleet(settings.run_dir)
        assert [r.name for r in view.snapshot().replicas] == ["replica-0", "replica-1"]
        await all_ready(supervisor)
        first = view.snapshot()
        assert (first.model, first.served_model_name, len(first.ready())) == ("fake/model", "fake", 2)
        await supervisor.drain("replica-1")
        assert view.snapshot().version > first.version
        assert [r.name for r in view.snapshot().ready()] == ["replica-0"]
        view.suspect("replica-0")
        view.suspect("nobody")


async def test_the_file_is_readable_json_for_others(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with running(settings) as supervisor:
        await all_ready(supervisor)
        content = json.loads((settings.run_dir / "fleet.json").read_text())
        assert [r["state"] for r in content["replicas"]] == ["ready", "ready"]
