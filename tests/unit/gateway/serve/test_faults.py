"""`peerkv serve` as a process over fake engines, while things go wrong: frozen, failing, deadly, out of descriptors."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.gateway.running_door import until
from tests.unit.gateway.serve.test_run import Process, peerkv

QUICK = {
    "PEERKV_HEALTH_INTERVAL_SECONDS": "0.2",
    "PEERKV_OVERDUE_SECONDS_MIN": "1",
    "PEERKV_CORE_FROZEN_SECONDS_MAX": "5",
}
FIRST_SECONDS_MAX = 8.0
START_SECONDS_MAX = 90.0  # five processes, beside whatever else this machine does


@pytest.fixture
def short_run_dir() -> Iterator[str]:
    """Beside the sockets of a real vLLM there is no room for a test's long path."""
    with tempfile.TemporaryDirectory(prefix="p") as directory:
        yield f"{directory}/run"


async def seen(gateway: Process, name: str) -> dict[str, Any]:
    connector = aiohttp.UnixConnector(str(gateway.directory / "run" / f"{name}.sock"))
    async with aiohttp.ClientSession(connector=connector) as session, session.get("http://x/fake/seen") as answer:
        found: dict[str, Any] = await answer.json()
        return found


async def replica(gateway: Process, name: str) -> dict[str, Any]:
    _, body = await gateway.get("/ready")
    return next(found for found in body["replicas"] if found["name"] == name)


async def comes(gateway: Process, name: str, holds: Callable[[dict[str, Any]], bool]) -> None:
    async def so() -> bool:
        return holds(await replica(gateway, name))

    await until(so, 30)


async def test_a_frozen_engines_requests_are_answered_by_another_and_it_is_restarted(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-core", **QUICK) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        await asyncio.gather(*(gateway.complete() for _ in range(8)))
        core = (await seen(gateway, "replica-0"))["core"]
        os.kill(core, signal.SIGSTOP)
        asked = [asyncio.create_task(gateway.complete(stream=number % 2 == 0)) for number in range(20)]
        await comes(gateway, "replica-0", lambda r: r["standing"] == "suspect" and not r["ready"] and r["reason"])
        answers = await asyncio.wait_for(asyncio.gather(*asked), FIRST_SECONDS_MAX)
        assert {status for status, _ in answers} == {200}
        await comes(gateway, "replica-0", lambda r: r["restarts"] == 1 and r["ready"] and r["standing"] == "well")
        _, stats = await gateway.get("/kv/stats")
        assert stats["gateway"]["retries"] > 0


async def test_an_engine_that_was_frozen_for_a_moment_is_left_alone(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-core", **QUICK) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        await asyncio.gather(*(gateway.complete() for _ in range(8)))
        core = (await seen(gateway, "replica-0"))["core"]
        os.kill(core, signal.SIGSTOP)
        asked = [asyncio.create_task(gateway.complete()) for _ in range(10)]
        await comes(gateway, "replica-0", lambda r: r["standing"] == "suspect")
        os.kill(core, signal.SIGCONT)
        assert {status for status, _ in await asyncio.gather(*asked)} == {200}
        await comes(gateway, "replica-0", lambda r: r["ready"] and r["standing"] in ("well", "half-open"))
        assert (await replica(gateway, "replica-0"))["restarts"] == 0


async def test_a_replica_whose_answers_fail_gets_few_requests_and_all_are_answered(tmp_path: Path) -> None:
    engine = "--fake-core --fake-status 500 --fake-exit-on replica-0"
    async with peerkv(tmp_path, engine=engine, PEERKV_EJECT_SECONDS_MIN="60", PEERKV_EJECT_SECONDS_MAX="60") as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        for _ in range(10):
            assert {status for status, _ in await asyncio.gather(*(gateway.complete() for _ in range(20)))} == {200}
        assert len((await seen(gateway, "replica-0"))["requests"]) <= 20  # those of the first burst, sent before any answer
        found = await replica(gateway, "replica-0")
        assert (found["standing"], found["ready"], "answered 500" in found["reason"]) == ("ejected", False, True)
        _, stats = await gateway.get("/kv/stats")
        assert [(r["standing"], r["ejections"]) for r in stats["replicas"]] == [("ejected", 1), ("well", 0)]
        async with gateway.session.get(gateway.url + "/metrics") as answer:
            metrics = await answer.text()
        assert 'peerkv_ejections_total{replica="replica-0"} 1.0' in metrics
        assert 'peerkv_replica_well{replica="replica-0"} 0.0' in metrics


async def test_a_request_that_ends_its_engine_ends_one_and_those_beside_it_are_answered(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-core") as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        slow = {"max_tokens": 30, "fake": {"token_delay": 0.1}}
        beside = [asyncio.create_task(gateway.complete(**slow)) for _ in range(6)]

        async def all_run() -> bool:
            _, stats = await gateway.get("/kv/stats")
            return sum(r["load"]["decoding_requests"] for r in stats["replicas"]) == 6

        await until(all_run)
        status, text = await gateway.complete(fake={"die": "before"})
        assert (status, '"replica_lost"' in text) == (502, True)
        assert {status for status, _ in await asyncio.gather(*beside)} == {200}
        restarts = [(await replica(gateway, name))["restarts"] for name in ("replica-0", "replica-1")]
        assert sum(restarts) <= 1
        await gateway.ready(seconds=START_SECONDS_MAX)


async def test_requests_that_had_no_step_yet_when_their_engine_ended_go_to_the_last_replica(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--fake-core") as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        waiting = [asyncio.create_task(gateway.complete(fake={"waits": True, "on": "replica-0"})) for _ in range(6)]

        async def waits() -> bool:
            _, stats = await gateway.get("/kv/stats")
            there = next(r for r in stats["replicas"] if r["name"] == "replica-0")["load"]["waiting_requests"]
            return 0 < there == sum(not task.done() for task in waiting)

        await until(waits)
        os.kill((await seen(gateway, "replica-0"))["core"], signal.SIGKILL)
        assert {status for status, _ in await asyncio.gather(*waiting)} == {200}


async def test_silent_connections_do_no_harm_where_descriptors_are_few(tmp_path: Path) -> None:
    async with peerkv(tmp_path, PEERKV_HEALTH_INTERVAL_SECONDS="0.2", descriptors=256) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        assert any("256 descriptors are too few, so requests_in_flight_max" in line for line in gateway.err)
        before = [await seen(gateway, name) for name in ("replica-0", "replica-1")]
        silent = []
        try:
            for _ in range(400):
                connection = socket.create_connection(("127.0.0.1", gateway.port))
                connection.setblocking(False)
                silent.append(connection)
            answers = await asyncio.gather(*(gateway.complete() for _ in range(30)), return_exceptions=True)
            assert not any(isinstance(answer, tuple) and answer[0] not in (200, 429, 503) for answer in answers)
            for connection in silent[:200]:
                connection.close()
            await until(lambda: well(gateway))
        finally:
            for connection in silent:
                connection.close()
        after = [await seen(gateway, name) for name in ("replica-0", "replica-1")]
        assert [found["pid"] for found in after] == [found["pid"] for found in before]
        assert {found["restarts"] for found in [await replica(gateway, n) for n in ("replica-0", "replica-1")]} == {0}


async def listens(gateway: Process) -> bool:
    return (await gateway.get("/health"))[0] == 200


async def well(gateway: Process) -> bool:
    try:
        return (await gateway.complete())[0] == 200
    except aiohttp.ClientError:
        return False


async def test_a_hang_up_without_a_terminal_changes_nothing_but_a_line(tmp_path: Path) -> None:
    async with peerkv(tmp_path) as gateway:
        await gateway.ready(seconds=START_SECONDS_MAX)
        asked = asyncio.create_task(gateway.complete(max_tokens=20, fake={"token_delay": 0.02}))
        gateway.signal(signal.SIGHUP)
        await until(lambda: any("SIGHUP" in line for line in gateway.err))
        assert (await asked)[0] == 200
        assert (await gateway.complete())[0] == 200


async def test_when_the_terminal_goes_requests_are_answered_before_the_end(tmp_path: Path) -> None:
    screen, terminal = os.openpty()
    try:
        async with peerkv(tmp_path, terminal=terminal) as gateway:
            await gateway.ready(seconds=START_SECONDS_MAX)
            asked = asyncio.create_task(gateway.complete(max_tokens=20, fake={"token_delay": 0.02}))

            async def runs() -> bool:
                return bool((await seen(gateway, "replica-0"))["requests"] or (await seen(gateway, "replica-1"))["requests"])

            await until(runs)
            os.close(screen)
            assert (await asked)[0] == 200
            assert await gateway.ended() == 0
            await gateway.nothing_is_left()
    finally:
        os.close(terminal)


@pytest.mark.parametrize("log_dir", ["/proc/x", "/dev/null/x", "/dev/full"])
async def test_a_log_directory_that_cannot_be_written_to_is_one_line(tmp_path: Path, log_dir: str) -> None:
    async with peerkv(tmp_path, PEERKV_LOG_DIR=log_dir) as gateway:
        assert await gateway.ended() == 1
        assert gateway.err[-1].startswith(f"peerkv: error: cannot write logs to {log_dir}: ")
        assert not [line for line in gateway.err if "Traceback" in line or "defect" in line]
        await gateway.nothing_is_left()


async def test_a_wrong_argument_is_said_once_in_the_last_line_and_tried_once(tmp_path: Path) -> None:
    async with peerkv(tmp_path, engine="--max-model-len nonsense") as gateway:
        assert await gateway.ended() == 1
        assert "invalid" in gateway.err[-1]
        assert "--max-model-len" in gateway.err[-1]
        assert sum("--max-model-len" in line for line in gateway.err) == 1
        assert len(gateway.err) <= 8
        assert not [line for line in gateway.err if "backoff" in line]


@pytest.mark.parametrize(("model", "said"), [("/no/such/model", "there is no model at"), ("{empty}", "holds no model")])
async def test_a_path_without_a_model_is_refused_before_anything_starts(
    tmp_path: Path, short_run_dir: str, model: str, said: str
) -> None:
    (tmp_path / "empty").mkdir()
    named = model.format(empty=tmp_path / "empty")
    async with peerkv(tmp_path, named, PEERKV_LAUNCHER="", PEERKV_RUN_DIR=short_run_dir) as gateway:
        assert await gateway.ended() == 1
        assert said in gateway.err[-1]
        assert not [line for line in gateway.err if "importing" in line or "starting" in line]
        await gateway.nothing_is_left()


async def test_a_hub_that_does_not_answer_is_said_within_ten_seconds(tmp_path: Path, short_run_dir: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hole:
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{hole.getsockname()[1]}", "HF_HOME": str(tmp_path / "hub")}
        async with peerkv(tmp_path, "org/name", PEERKV_LAUNCHER="", PEERKV_RUN_DIR=short_run_dir, **hub) as gateway:
            await until(lambda: listens(gateway), 30)
            await until(lambda: any("cannot be had from the hub" in line for line in gateway.err), 10)
            assert await gateway.ended() == 1
