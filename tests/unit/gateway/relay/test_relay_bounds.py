"""Bounds of bodies, answers and requests at once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.gateway.relay.relay_client import COMPLETION, chunks_of, lines_of
from tests.unit.gateway.running_door import running_door, until


async def test_an_answer_over_the_bound_arrives_whole(tmp_path: Path) -> None:
    async with running_door(tmp_path, answer_bytes_max=4096) as door:
        await door.add_engine("replica-0")
        status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"body_bytes": 3_000_000}})
        assert (status, len(body["choices"][0]["text"])) == (200, 3_000_000)
        assert "content-length" not in headers


async def test_an_event_over_the_bound_arrives_whole(tmp_path: Path) -> None:
    async with running_door(tmp_path, answer_bytes_max=4096) as door:
        await door.add_engine("replica-0")
        body = COMPLETION | {"stream": True, "fake": {"body_bytes": 3_000_000}}
        lines = await lines_of(door, "/v1/completions", body)
        assert len(json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"]) == 3_000_000
        assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("known_length", [True, False])
async def test_a_body_over_the_bound_is_413(tmp_path: Path, known_length: bool) -> None:
    async with running_door(tmp_path, body_bytes_max=2048) as door:
        data: Any = b"x" * 8192 if known_length else chunks_of(8192)
        headers = {"content-type": "application/json"}
        status, body, _ = await door.post("/v1/completions", data=data, json=None, headers=headers)
        assert (status, body["error"]["code"]) == (413, "body_too_large")


async def test_requests_over_the_bound_get_429(tmp_path: Path) -> None:
    async with running_door(tmp_path, requests_in_flight_max=1) as door:
        await door.add_engine("replica-0")
        slow = asyncio.create_task(door.post("/v1/completions", COMPLETION | {"fake": {"token_delay": 0.1}}))
        await until(lambda: door.relay.in_flight == 1)
        status, body, headers = await door.post("/v1/completions", COMPLETION)
        assert (status, body["error"]["code"], headers["retry-after"]) == (429, "too_many_requests", "1")
        assert (await slow)[0] == 200


async def test_bodies_over_the_bound_in_all_get_503_and_the_bytes_are_given_back(tmp_path: Path) -> None:
    async with running_door(tmp_path, bodies_bytes_max=2048) as door:
        await door.add_engine("replica-0")
        big = COMPLETION | {"prompt": "x" * 1500}
        slow = asyncio.create_task(door.post("/v1/completions", big | {"fake": {"token_delay": 0.1}}))

        async def running() -> bool:
            return bool((await door.seen("replica-0"))["running"] == 1)

        await until(running)
        assert (await door.post("/v1/completions", big))[0] == 503
        assert (await slow)[0] == 200
        assert (await door.post("/v1/completions", big))[0] == 200


async def test_a_body_that_never_ends_is_408(tmp_path: Path) -> None:
    async with running_door(tmp_path, body_seconds_max=0.2) as door:
        reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(head + b"content-length: 100\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
