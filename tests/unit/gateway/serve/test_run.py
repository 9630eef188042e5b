"""`peerkv serve` and its halves as processes, over fake engines: start, drain, stop, failures."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shlex
import signal
import socket
import sys
import termios
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from engine.host_process.directories import DirectoryRefused, claim, release
from engine.replicas.shared_memory_check import SharedMemoryTooSmall
from gateway.serve.run import engine as run_engine
from gateway.serve.run import serve as run_serve
from gateway.settings import Settings, load
from tests.unit.gateway.running_door import until

ROOT = Path(__file__).parents[4]
FAKE_ENGINE = ROOT / "tests" / "fake_engine.py"
COMPLETION = {"prompt": "hello", "max_tokens": 3}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Process:
    """One peerkv process; what it prints is collected."""

    process: asyncio.subprocess.Process
    port: int
    directory: Path
    session: aiohttp.ClientSession
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    readers: list[asyncio.Task[None]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def get(self, path: str) -> tuple[int, Any]:
        try:
            async with self.session.get(self.url + path) as answer:
                return answer.status, await answer.json()
        except aiohttp.ClientConnectionError:
            return 0, None

    async def complete(self, **extra: Any) -> tuple[int, str]:
        async with self.session.post(self.url + "/v1/completions", json=COMPLETION | extra) as answer:
            return answer.status, await answer.text()

    async def ready(self, count: int = 2, seconds: float = 30.0) -> None:
        async def enough() -> bool:
            assert self.process.returncode is None, "".join(self.err)
            status, body = await self.get("/ready")
            return status == 200 and sum(r["ready"] for r in body["replicas"]) == count

        await until(enough, seconds)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def ended(self) -> int:
        """The exit status, with all output read."""
        async with asyncio.timeout(30):
            status = await self.process.wait()
            await asyncio.gather(*self.readers)
        return status

    def engines(self) -> list[int]:
        """The fake engines that live, by their command line."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes()
                    if str(self.directory).encode() in words and b"fake_engine.py" in words:
                        found.append(int(entry.name))
        return found

    async def nothing_is_left(self) -> None:
        """Wait for every process and directory of it to be gone."""
        await until(lambda: not self.engines())
        await until(lambda: not (self.directory / "run").exists() and not (self.directory / "tables").exists())


async def collect(stream: asyncio.StreamReader, lines: list[str]) -> None:
    while line := await stream.readline():
        lines.append(line.decode())


@contextlib.asynccontextmanager
async def peerkv(
    directory: Path,
    *arguments: str,
    command: str = "serve",
    engine: str = "",
    port: int | None = None,
    descriptors: int | None = None,
    terminal: int | None = None,
    **env: str,
) -> AsyncIterator[Process]:
    """Run a command with fake engines; `engine` are arguments of theirs, `descriptors` the hard limit of all.

    `terminal`, a descriptor, becomes the terminal that it belongs to and writes to.
    """
    port = port or free_port()
    own = {
        "PEERKV_LAUNCHER": shlex.join([sys.executable, str(FAKE_ENGINE)]) + " " + engine,
        "PEERKV_RUN_DIR": str(directory / "run"),
        "PEERKV_TABLE_DIR": str(directory / "tables"),
        "PEERKV_LOG_DIR": str(directory / "logs"),
        "PEERKV_LIMITS_FILE": str(directory / "limits.json"),
        "PEERKV_PORT": str(port),
        "PEERKV_REPLICAS": "2",
        "PEERKV_BACKOFF_SECONDS_MIN": "0.05",
        "PEERKV_BACKOFF_SECONDS_MAX": "0.1",
        "PEERKV_TERMINATE_SECONDS": "2",
        "PYTHONPATH": str(ROOT),
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")}
    limited = ["prlimit", f"--nofile={descriptors}:{descriptors}"] if descriptors is not None else []
    process = await asyncio.create_subprocess_exec(
        *limited,
        sys.executable,
        "-m",
        "gateway.cli",
        command,
        *arguments,
        env=kept | own | env,
        stdout=asyncio.subprocess.PIPE if terminal is None else terminal,
        stderr=asyncio.subprocess.PIPE if terminal is None else terminal,
        start_new_session=terminal is not None,
        preexec_fn=None if terminal is None else partial(fcntl.ioctl, terminal, termios.TIOCSCTTY, 0),
    )
    async with aiohttp.ClientSession() as session:
        running = Process(process, port, directory, session)
        running.readers = [
            asyncio.create_task(collect(stream, lines))
            for stream, lines in ((process.stdout, running.out), (process.stderr, running.err))
            if stream is not None
        ]
        try:
            yield running
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await until(lambda: not running.engines())
            await asyncio.gather(*running.readers)


async def test_serve_starts_says_where_and_stops_without_a_trace(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        assert (await gateway.complete())[0] == 200
        await until(lambda: any("curl" in line for line in gateway.out))
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        text = "".join(gateway.out)
        assert f"at {gateway.url}/v1 (2 of 2 replicas ready)" in text
        assert f" kv stats --url {gateway.url}\n" in text
        assert str(tmp_path / "logs") in text
        await gateway.nothing_is_left()


async def test_the_curl_line_of_the_banner_works(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        line = await until(lambda: next((x for x in gateway.out if "/v1/completions" in x), ""))
        command = line.split(" ", 2)[2].strip().removeprefix("try").strip()
        curl = await asyncio.create_subprocess_shell(command + " -s", stdout=asyncio.subprocess.PIPE)
        output, _ = await curl.communicate()
        assert json.loads(output)["choices"][0]["text"].startswith("w0 ")


async def test_a_running_request_finishes_after_sigterm_and_new_ones_are_refused(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        slow = asyncio.create_task(gateway.complete(fake={"token_delay": 0.5}))
        await until(lambda: _in_flight(gateway))
        gateway.signal(signal.SIGTERM)
        await until(lambda: _refuses_connections(gateway.port))
        status, text = await slow
        assert (status, json.loads(text)["choices"][0]["text"]) == (200, "w0 w1 w2 ")
        assert await gateway.ended() == 0


async def test_a_request_that_takes_too_long_is_ended_with_an_error(tmp_path: Path) -> None:
    async with peerkv(tmp_path, PEERKV_DRAIN_SECONDS="0.2") as gateway:
        await gateway.ready()
        endless = COMPLETION | {"max_tokens": 1_000_000, "stream": True, "fake": {"token_delay": 0.05}}
        async with gateway.session.post(gateway.url + "/v1/completions", json=endless) as answer:
            assert (await answer.content.readline()).startswith(b"data: ")
            gateway.signal(signal.SIGINT)
            last = [line for line in (await answer.text()).splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
        assert await gateway.ended() == 0
        await gateway.nothing_is_left()


async def test_a_second_signal_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-deaf", PEERKV_TERMINATE_SECONDS="30") as gateway:
        await gateway.ready()
        slow = asyncio.create_task(gateway.complete(fake={"delay": 60}))
        await until(lambda: _in_flight(gateway))
        gateway.signal(signal.SIGINT)
        await until(lambda: any("stopping" in line for line in gateway.err))
        gateway.signal(signal.SIGINT)
        async with asyncio.timeout(2):
            assert await gateway.process.wait() == 130
        with pytest.raises(aiohttp.ClientError):
            await slow
        await gateway.nothing_is_left()


async def test_kill_9_of_the_gateway_leaves_nothing(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        assert len(gateway.engines()) == 2
        gateway.signal(signal.SIGKILL)
        await gateway.ended()
        await gateway.nothing_is_left()


async def test_a_replica_that_is_killed_comes_back_and_nobody_notices(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        sockets = list((tmp_path / "run").glob("*.sock"))
        os.kill(gateway.engines()[0], signal.SIGKILL)
        await until(lambda: any(map(_is_closed, sockets)))  # a request that it had got could be what ended it
        answers = await asyncio.gather(*(gateway.complete() for _ in range(8)))
        assert {status for status, _ in answers} == {200}
        await until(lambda: _restarts(gateway))
        await gateway.ready()


async def test_stopping_while_the_replicas_start_is_clean(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-start-seconds 60") as gateway:
        await until(lambda: len(gateway.engines()) == 2)
        assert (await gateway.get("/health"))[0] == 200
        assert (await gateway.get("/ready"))[0] == 503
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0
        await gateway.nothing_is_left()


async def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with peerkv(tmp_path, port=taken.getsockname()[1]) as gateway:
            assert await gateway.ended() == 1
            assert "cannot listen on 127.0.0.1" in gateway.err[-1]
            assert not (tmp_path / "run").exists()


async def test_replicas_that_cannot_start_end_it_with_the_last_lines_of_their_logs(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-exit-code 3", PEERKV_START_FAILURES_MAX="2") as gateway:
        assert await gateway.ended() == 1
        text = "".join(gateway.err)
        assert "| fake engine: cannot start, as you asked" in text
        assert "peerkv: error: " in gateway.err[-1]
        assert "status 3" in gateway.err[-1]
        await gateway.nothing_is_left()


async def test_one_replica_that_cannot_start_does_not_keep_the_other_from_serving(tmp_path: Path) -> None:
    engine = "--fake-exit-code 3 --fake-exit-on replica-1"
    async with peerkv(tmp_path, engine=engine, PEERKV_START_FAILURES_MAX="2") as gateway:
        await gateway.ready(1)
        await until(lambda: any("1 of 2 replicas ready" in line for line in gateway.out), 30)
        assert (await gateway.complete())[0] == 200


@pytest.mark.parametrize("run", [run_serve, run_engine], ids=["serve", "engine"])
async def test_shared_memory_that_is_too_small_is_said_before_a_model_is_fetched(
    run: Callable[[Settings], Coroutine[Any, Any, None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    async def make(*command: str, **more: Any) -> None:
        made.append(command[-1])
        raise OSError("this test fetches nothing")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", make)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=64 << 20 >> 12, f_frsize=1 << 12))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on the CPU, where /dev/shm holds the KV
    settings = load({"port": free_port(), "run_dir": tmp_path / "run", "table_dir": tmp_path / "tables"})
    with pytest.raises(SharedMemoryTooSmall):
        await run(settings)
    assert made == []


@pytest.mark.parametrize("run", [run_serve, run_engine])
async def test_a_directory_of_another_running_peerkv_is_told_before_a_model_is_fetched(
    run: Callable[[Settings], Coroutine[Any, Any, None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def make(*command: str, **more: Any) -> None:
        raise OSError("this test fetches nothing")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", make)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    given = {"port": free_port(), "run_dir": tmp_path / "run", "table_dir": tmp_path / "tables", "claim_seconds_max": 0.2}
    held = claim(tmp_path / "run", 0.0)
    try:
        with pytest.raises(DirectoryRefused, match=f"{tmp_path}/run is in use"):
            await run(load(given))
    finally:
        release([held])
    assert f"{tmp_path}/run is in use by another running peerkv: waiting up to 0.2 s" in capsys.readouterr().err


async def test_who_waits_for_another_peerkv_to_end_can_be_stopped(tmp_path: Path) -> None:
    held = claim(tmp_path / "run", 0.0)
    try:
        async with peerkv(tmp_path, PEERKV_CLAIM_SECONDS_MAX="300") as gateway:
            await until(lambda: any("in use by another running peerkv: waiting" in line for line in gateway.err), 30)
            gateway.signal(signal.SIGINT)
            assert await gateway.ended() == 0
            assert "stopping" in gateway.err[-1]
    finally:
        release([held])


async def test_a_disk_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with peerkv(tmp_path, "--disk", str(tmp_path / "file" / "disk")) as gateway:
        assert await gateway.ended() == 1
        assert f"disk: {tmp_path}/file/disk cannot be used: {tmp_path}/file is no directory" in gateway.err[-1]


async def test_a_reserved_argument_of_vllm_is_refused(tmp_path: Path) -> None:
    async with peerkv(tmp_path, "--", "--port", "1") as gateway:
        assert await gateway.ended() == 2
        assert "--port" in gateway.err[-1]


async def test_replicas_of_a_stopping_engine_finish_their_requests_and_get_no_others(tmp_path: Path) -> None:
    async with peerkv(tmp_path, command="gateway") as gateway, peerkv(tmp_path, command="engine") as engine:
        await gateway.ready()
        slow = asyncio.create_task(gateway.complete(fake={"token_delay": 0.5}))
        await until(lambda: _in_flight(gateway))
        engine.signal(signal.SIGTERM)

        async def drains() -> bool:
            _, body = await gateway.get("/ready")
            return {replica["state"] for replica in body["replicas"]} == {"draining"}

        await until(drains)
        assert not slow.done()
        assert (await gateway.complete())[0] == 503
        status, text = await slow
        assert (status, json.loads(text)["choices"][0]["text"]) == (200, "w0 w1 w2 ")
        assert await engine.ended() == 0
        assert _says(engine, "waiting up to 30 s for the replicas' requests to finish")


async def test_replicas_of_a_stopping_engine_have_drain_seconds_and_a_second_signal_ends_them_at_once(tmp_path: Path) -> None:
    endless = COMPLETION | {"max_tokens": 1_000_000, "stream": True, "fake": {"token_delay": 0.05}}
    for seconds, status in (("0.3", 0), ("300", 130)):
        async with (
            peerkv(tmp_path, command="gateway") as gateway,
            peerkv(tmp_path, command="engine", PEERKV_DRAIN_SECONDS=seconds) as engine,
        ):
            await gateway.ready()
            async with gateway.session.post(gateway.url + "/v1/completions", json=endless) as answer:
                assert (await answer.content.readline()).startswith(b"data: ")
                engine.signal(signal.SIGTERM)
                if status:
                    await until(lambda engine=engine: _says(engine, "waiting up to 300 s"))
                    engine.signal(signal.SIGTERM)
                last = [line for line in (await answer.text()).splitlines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"
            assert await engine.ended() == status
            await engine.nothing_is_left()


async def test_gateway_and_engine_run_as_two_processes(tmp_path: Path) -> None:
    async with peerkv(tmp_path, command="gateway") as gateway:
        await until(lambda: _says(gateway, "waiting for the replicas of") and _says(gateway, "which `peerkv engine` starts"))
        assert (await gateway.get("/health"))[0] == 200
        async with peerkv(tmp_path, command="engine") as engine:
            await gateway.ready()
            assert (await gateway.complete())[0] == 200
            engine.signal(signal.SIGTERM)
            assert await engine.ended() == 0
            status, body = await gateway.get("/ready")
            assert (status, body["ready"]) == (503, False)
        async with peerkv(tmp_path, command="engine"):
            await gateway.ready()
            assert (await gateway.complete())[0] == 200
        gateway.signal(signal.SIGTERM)
        assert await gateway.ended() == 0


def _serves(gateway: Process) -> bool:
    assert gateway.process.returncode is None, "".join(gateway.err)
    return any("peerkv serves" in line for line in gateway.out)


async def test_several_gateways_share_a_port_and_the_replicas(tmp_path: Path) -> None:
    async def completes(port: int) -> bool:
        url = f"http://127.0.0.1:{port}/v1/completions"
        # A connection of its own, so that the kernel deals it out anew.
        async with aiohttp.ClientSession() as session, session.post(url, json=COMPLETION) as answer:
            return answer.status == 200

    shared = {"PEERKV_REUSE_PORT": "1"}
    async with (
        peerkv(tmp_path, command="gateway", **shared) as first,
        peerkv(tmp_path, command="gateway", port=first.port, **shared) as second,
        peerkv(tmp_path, command="engine"),
    ):
        for gateway in (first, second):
            await until(partial(_serves, gateway), 60)
        assert all([await completes(first.port) for _ in range(40)])
        first.signal(signal.SIGTERM)
        assert await first.ended() == 0
        assert all([await completes(second.port) for _ in range(40)])


@pytest.mark.parametrize("what", ["PEERKV_MODEL", "PEERKV_TABLE_DIR"])
async def test_a_gateway_whose_engine_came_back_as_another_ends_with_an_error(tmp_path: Path, what: str) -> None:
    async with peerkv(tmp_path, command="gateway") as gateway:
        async with peerkv(tmp_path, command="engine") as engine:
            await gateway.ready()
            engine.signal(signal.SIGTERM)
            assert await engine.ended() == 0
        async with peerkv(tmp_path, command="engine", **{what: str(tmp_path / "another")}):
            assert await gateway.ended() == 1
            assert "restart the gateway" in gateway.err[-1]


async def test_the_gateway_shows_that_it_compared_token_ids(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready()
        await until(lambda: _compared(gateway))


async def _compared(gateway: Process) -> bool:
    _, stats = await gateway.get("/kv/stats")
    return bool(stats and stats["parity"]["checks"])


async def _in_flight(gateway: Process) -> bool:
    _, stats = await gateway.get("/kv/stats")
    return bool(stats and stats["gateway"]["in_flight"])


async def _restarts(gateway: Process) -> bool:
    _, body = await gateway.get("/ready")
    return any(replica["restarts"] for replica in body["replicas"])


def _says(gateway: Process, words: str) -> bool:
    return any(words in line for line in gateway.err)


def _is_closed(path: Path) -> bool:
    """Whether nobody listens on a unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return True
    return False


def _refuses_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
