"""What is told of each request when it is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.api.usage import Usage
from gateway.ledger.ledger import LEFT_STATUS
from gateway.relay.request_record import RequestRecord
from tests.unit.gateway.relay.relay_client import CHAT, COMPLETION, KEYS
from tests.unit.gateway.running_door import Door, running_door, until


class Kept:
    """A meter that keeps copies."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def answered(self, record: RequestRecord) -> None:
        self.records.append(msgspec.structs.replace(record))

    async def one(self) -> RequestRecord:
        await until(lambda: self.records)
        (record,) = self.records
        return record


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
async def door(tmp_path: Path, kept: Kept) -> AsyncIterator[Door]:
    async with running_door(tmp_path, meters=[kept]) as door:
        await door.add_engine("replica-0")
        yield door


async def stream(door: Door, path: str, body: dict[str, Any]) -> None:
    async with door.session.post(door.url + path, json=body | {"stream": True}) as answer:
        await answer.read()


async def test_a_whole_answer_tells_of_its_tokens_and_times(door: Door, kept: Kept) -> None:
    await door.post("/v1/completions", COMPLETION, headers={"x-request-id": "mine"})
    record = await kept.one()
    assert (record.endpoint, record.request_id, record.tenant, record.model) == (
        "completions",
        "mine",
        "anonymous",
        "fake-model",
    )
    assert (record.status, record.error, record.streamed, record.attempts) == (200, "", False, 1)
    assert (record.usage, record.completion_tokens) == (Usage(5, 3), 3)
    assert record.attempt is door.recorder.attempts[0]
    assert 0 < (record.first_byte_seconds or 0) <= record.seconds


async def test_a_stream_with_usage_tells_it(door: Door, kept: Kept) -> None:
    await stream(door, "/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
    record = await kept.one()
    assert (record.endpoint, record.streamed, record.status) == ("chat", True, 200)
    assert record.usage is not None
    assert (record.usage.completion_tokens, record.events) == (3, 0)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
async def test_a_stream_that_goes_on_elsewhere_has_as_many_events_as_an_undisturbed_one(
    door: Door, kept: Kept, path: str, body: dict[str, Any]
) -> None:
    await door.add_engine("replica-1")
    for asked in ({}, {"on": "replica-0", "drop": "mid", "after": 3}):
        await stream(door, path, body | {"max_tokens": 8, "temperature": 0, "user": json.dumps(asked)})
    await until(lambda: len(kept.records) == 2)
    assert door.relay.counters.streams_continued == 1
    whole, cut = kept.records
    assert whole.usage is None
    assert (cut.attempts, cut.events) == (2, whole.events)


async def test_the_tokens_of_a_stream_without_usage_are_estimated_by_its_events(door: Door, kept: Kept) -> None:
    await stream(door, "/v1/completions", COMPLETION | {"max_tokens": 9})
    record = await kept.one()
    assert (record.usage, record.completion_tokens) == (None, 9)


async def test_an_error_is_told_by_its_code(door: Door, kept: Kept) -> None:
    await door.post("/v1/completions", COMPLETION | {"model": "no-such-model"})
    record = await kept.one()
    assert (record.status, record.error, record.model, record.attempts) == (404, "model_not_found", "", 0)
    assert record.attempt is None


async def test_an_error_of_the_engine_is_told_by_its_code(door: Door, kept: Kept) -> None:
    error = {"message": "no", "type": "NotFoundError", "param": "model", "code": 404}
    await door.post("/v1/completions", COMPLETION | {"fake": {"status": 404, "error": {"error": error}}})
    record = await kept.one()
    assert (record.status, record.error, record.attempts) == (404, "model_not_found", 1)


async def test_a_stream_that_the_engine_ends_with_an_error_has_its_code(door: Door, kept: Kept) -> None:
    await stream(door, "/v1/completions", COMPLETION | {"max_tokens": 9, "fake": {"stream_error": 4}})
    record = await kept.one()
    assert (record.status, record.error, record.events) == (200, "internal_error", 4)


async def test_a_stream_whose_replica_is_lost_tells_what_came_until_then(door: Door, kept: Kept) -> None:
    await stream(
        door, "/v1/completions", COMPLETION | {"max_tokens": 9, "fake": {"drop": "mid", "after": 4, "token_delay": 0.01}}
    )
    record = await kept.one()
    assert (record.status, record.error, record.events) == (200, "replica_lost", 4)


async def test_a_second_attempt_is_told_in_place_of_the_first(door: Door, kept: Kept) -> None:
    await door.add_engine("replica-1")
    door.recorder.borne = True
    await door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "drop": "before"}})
    record = await kept.one()
    assert record.attempt is not None
    assert (record.status, record.attempts, record.attempt.replica) == (200, 2, "replica-1")


async def test_a_client_that_leaves_is_told_of(door: Door, kept: Kept) -> None:
    async with asyncio.timeout(10):
        async with door.session.post(
            door.url + "/v1/completions", json=COMPLETION | {"stream": True, "max_tokens": 900, "fake": {"token_delay": 0.01}}
        ) as answer:
            await answer.content.readline()
    record = await kept.one()
    assert (record.status, record.error) == (LEFT_STATUS, "")
    assert record.events > 0


async def test_the_caller_is_told_by_the_tenants_name_and_a_stranger_by_none(tmp_path: Path, kept: Kept) -> None:
    async with running_door(tmp_path, meters=[kept], tenants=KEYS) as door:
        await door.add_engine("replica-0")
        for key in (KEYS[1]["api_key"], "of-nobody"):
            await door.post("/v1/completions", COMPLETION, headers={"authorization": f"Bearer {key}"})
    assert [(record.tenant, record.status, record.error) for record in kept.records] == [
        ("b", 200, ""),
        ("", 401, "invalid_api_key"),
    ]


async def test_what_is_no_completion_is_told_under_one_label(door: Door, kept: Kept) -> None:
    await door.get("/v1/models")
    record = await kept.one()
    assert (record.endpoint, record.status, record.request_id != "") == ("models", 200, True)
