"""What the relay tells of each attempt, over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.ledger.attempts import RequestInfo
from gateway.ledger.ledger import LEFT_STATUS, LOST_STATUS
from tests.unit.gateway.running_door import Door, running_door, until

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 3}


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        yield door


async def test_a_whole_answer_carries_the_header_and_is_told_once(door: Door) -> None:
    status, _, headers = await door.post("/v1/completions", COMPLETION, headers={"x-request-id": "me-1"})
    assert (status, headers["x-peerkv-cache"]) == (200, door.recorder.header.decode())
    assert door.recorder.events == [("begun", "replica-0"), ("first byte", "replica-0"), ("ended", "replica-0", 200)]
    assert [attempt.info for attempt in door.recorder.attempts] == [
        RequestInfo("me-1", "completions", "anonymous", "fake-model")
    ]


async def test_a_stream_carries_the_header_too(door: Door) -> None:
    async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"stream": True}) as answer:
        assert answer.headers["x-peerkv-cache"] == door.recorder.header.decode()
        await answer.read()
    await until(lambda: len(door.recorder.events) == 3)
    assert door.recorder.events == [("begun", "replica-0"), ("first byte", "replica-0"), ("ended", "replica-0", 200)]


async def test_nothing_known_means_no_header(door: Door) -> None:
    door.recorder.header = b""
    _, _, headers = await door.post("/v1/completions", COMPLETION)
    assert "x-peerkv-cache" not in headers


async def test_a_replica_that_dies_makes_two_attempts_under_one_id(door: Door) -> None:
    await door.add_engine("replica-1")
    await door.add_engine("replica-2")
    fake = {"drop": "before", "on": "replica-0"}
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": fake})
    assert (status, headers["x-peerkv-replica"]) == (200, "replica-1")
    assert door.recorder.events[:3] == [("begun", "replica-0"), ("ended", "replica-0", LOST_STATUS), ("begun", "replica-1")]
    assert door.recorder.events[-1] == ("ended", "replica-1", 200)
    assert len({attempt.info.request_id for attempt in door.recorder.attempts}) == 1


async def test_a_request_that_no_replica_serves_says_so_without_the_header(door: Door) -> None:
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"drop": "before"}})
    assert status == 502
    assert "x-peerkv-cache" not in headers
    assert door.recorder.events == [("begun", "replica-0"), ("ended", "replica-0", LOST_STATUS)]


async def test_a_refusal_of_the_engine_has_its_status(door: Door) -> None:
    await door.post("/v1/completions", COMPLETION | {"fake": {"status": 422}})
    assert door.recorder.events[-1] == ("ended", "replica-0", 422)


async def test_a_client_that_leaves_ends_its_attempt(door: Door) -> None:
    body = COMPLETION | {"stream": True, "max_tokens": 1000, "fake": {"token_delay": 0.05}}
    async with door.session.post(door.url + "/v1/completions", json=body) as answer:
        await answer.content.readany()
    await until(lambda: len(door.recorder.events) == 3)
    assert door.recorder.events[-1] == ("ended", "replica-0", LEFT_STATUS)
