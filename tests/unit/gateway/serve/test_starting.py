"""What is answered while the gateway starts."""

from __future__ import annotations

import asyncio

import aiohttp

from gateway.admin.health import Readiness
from gateway.http_server.server import bind, build_server
from gateway.serve.starting import StartingDoor
from gateway.settings import Settings
from tests.unit.gateway.running_door import until


async def test_ready_has_the_fields_that_it_has_later_and_says_what_is_waited_for() -> None:
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = build_server(StartingDoor("starting the replicas"), Settings())
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    async with aiohttp.ClientSession() as session:
        async with session.get(url + "/ready") as answer:
            assert (answer.status, int(answer.headers["retry-after"]) > 0) == (503, True)
            body = await answer.json()
        async with session.get(url + "/health") as answer:
            assert (answer.status, await answer.json()) == (200, {"status": "ok"})
        async with session.get(url + "/v1/models") as answer:
            assert answer.status == 503
            assert "starting the replicas" in (await answer.json())["error"]["message"]
    server.should_exit = True
    await serving
    assert body == {
        "ready": False,
        "reason": "starting the replicas",
        "model": "",
        "models": [],
        "warnings": [],
        "replicas": [],
    }
    assert body.keys() == Readiness.model_fields.keys()
