"""Replicas restarted by `peerkv replicas restart` under load: no request fails, and streams that outlast the drain go on."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from bench.continuity import stream
from tests.real.fleet import REPLICAS, RESTART_SECONDS_MAX, ROOT, Fleet, until
from tests.real.prompts import Words

CLIENTS = 3
TOKENS = 8


async def restart(fleet: Fleet, which: str) -> str:
    """What the command says; it has to succeed."""
    command = [sys.executable, "-m", "gateway.cli", "replicas", "restart", which, "--url", fleet.url]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    async with asyncio.timeout(2 * RESTART_SECONDS_MAX):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


def test_all_replicas_are_restarted_under_load_and_no_request_fails(fleet: Fleet, words: Words) -> None:
    shared = words.ids(200)
    former = {name: fleet.pid(name) for name in REPLICAS}
    answered: list[int] = []

    async def main() -> str:
        done = False

        async def ask(client: openai.AsyncOpenAI, streamed: bool) -> None:
            body = {"model": fleet.model, "prompt": shared + words.ids(8), "max_tokens": TOKENS, "temperature": 0}
            if not streamed:
                whole = await client.completions.create(**body)
                answered.append(whole.usage.completion_tokens)
                return
            events = [each async for each in await client.completions.create(**body, stream=True)]
            assert events[-1].choices[0].finish_reason == "length"
            answered.append(TOKENS)

        async def keep_asking(client: openai.AsyncOpenAI, streamed: bool) -> None:
            while not done:
                await ask(client, streamed)

        async with openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key=fleet.key, max_retries=0) as client:
            for _ in range(3):
                await ask(client, False)
            clients = [asyncio.create_task(keep_asking(client, number % 2 == 0)) for number in range(CLIENTS)]
            try:
                output = await restart(fleet, "--all")
            finally:
                done = True
            await asyncio.gather(*clients)
        return output

    output = asyncio.run(main())
    assert all(f"{name}: ready again after" in output for name in REPLICAS), output
    assert all(fleet.restarted(name, pid) for name, pid in former.items())
    assert len(answered) > CLIENTS
    assert set(answered) == {TOKENS}


@pytest.fixture
def hasty(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with next to no time for running requests before a restart: its settings are read again, later once more."""
    path = fleet.home / "peerkv.toml"
    config = path.read_text()
    path.write_text("drain_seconds = 0.2\n" + config)
    told = (fleet.home / "peerkv.log").read_text().count("changed from now on: drain_seconds")

    def reload(count: int) -> None:
        assert fleet.process is not None
        fleet.process.send_signal(signal.SIGHUP)
        log = fleet.home / "peerkv.log"
        until(lambda: log.read_text().count("changed from now on: drain_seconds") == count, 30.0, "the settings are read again")

    reload(told + 1)
    yield fleet
    path.write_text(config)
    reload(told + 2)


def test_a_stream_that_outlasts_the_drain_goes_on_elsewhere(hasty: Fleet, words: Words) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{hasty.url}/v1", api_key=hasty.key, max_retries=0) as client:
            prompt, begun = words.text(60), asyncio.Event()
            task = asyncio.create_task(stream(client, "completions", prompt, 200, begun, hasty.model))
            await begun.wait()
            (name,) = [replica["name"] for replica in hasty.stats()["replicas"] if replica["in_flight"]]
            await restart(hasty, name)
            disturbed = await task
            assert disturbed.replica == name
            assert disturbed.same_as(await stream(client, "completions", prompt, 200, model=hasty.model))

    before = hasty.stats()["gateway"]["streams_continued"]
    asyncio.run(main())
    assert hasty.stats()["gateway"]["streams_continued"] == before + 1
