"""Comments of our own while a stream's first event is waited for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.relay.keep_alive import COMMENT
from tests.unit.gateway.relay.relay_client import COMPLETION, client_of
from tests.unit.gateway.running_door import Door, running_door

SECONDS = 0.02
PREFILL = 0.5


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path, sse_keep_alive_seconds=SECONDS) as door:
        await door.add_engine("replica-0")
        comments = asyncio.create_task(door.relay.keep_alive.run())
        yield door
        comments.cancel()


async def streamed(door: Door, **body: Any) -> tuple[int, bytes, Any]:
    """The status, the body and the headers of a streamed completion."""
    given = COMPLETION | {"stream": True} | body
    async with door.session.post(door.url + "/v1/completions", json=given) as answer:
        return answer.status, await answer.read(), answer.headers


def events(text: bytes) -> list[bytes]:
    return [event for event in text.split(b"\n\n") if event and not event.startswith(b":")]


async def test_comments_come_before_the_first_event_and_none_behind_it(door: Door) -> None:
    status, text, headers = await streamed(door, fake={"delay": PREFILL, "token_delay": 3 * SECONDS})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    first = text.index(b"data: ")
    assert text[:first].count(COMMENT) >= 2
    assert COMMENT not in text[first:]
    assert events(text)[-1] == b"data: [DONE]"
    assert len(events(text)) == COMPLETION["max_tokens"] + 1


async def test_comments_are_not_the_answers_first_byte(door: Door) -> None:
    await streamed(door, fake={"delay": PREFILL})
    assert [what for what, *_ in door.recorder.events] == ["begun", "first byte", "ended"]


async def test_a_replica_that_dies_behind_our_comments_is_replaced(door: Door) -> None:
    await door.add_engine("replica-1")
    door.recorder.borne = True
    status, text, _ = await streamed(door, fake={"on": "replica-0", "delay": PREFILL, "drop": "before"})
    assert status == 200
    assert text.startswith(COMMENT)
    assert json.loads(events(text)[0].removeprefix(b"data: "))["system_fingerprint"] == "replica-1"
    assert door.relay.counters.retries == 1


async def test_an_error_behind_comments_is_the_streams_one_event(door: Door) -> None:
    status, text, _ = await streamed(door, fake={"delay": PREFILL, "status": 400})
    assert status == 200
    (event,) = events(text)
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == "as you asked"


async def test_an_error_that_comes_soon_enough_keeps_its_status(door: Door) -> None:
    status, _, headers = await streamed(door, model="no-such-model")
    assert (status, headers["content-type"]) == (404, "application/json")


async def test_answers_that_come_whole_get_no_comments(door: Door) -> None:
    status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"delay": 4 * SECONDS}})
    assert (status, headers["content-type"]) == (200, "application/json; charset=utf-8")
    assert body["choices"]


async def test_stock_clients_do_not_see_them(door: Door) -> None:
    body = {"fake": {"delay": PREFILL}}
    async with client_of(door) as client:
        stream = await client.completions.create(**COMPLETION, stream=True, extra_body=body)
        words = [chunk.choices[0].text async for chunk in stream]
    assert words == ["w0 ", "w1 ", "w2 "]


async def test_without_the_setting_there_are_none(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        await door.relay.keep_alive.run()  # ends at once
        _, text, headers = await streamed(door, fake={"delay": 0.1})
    assert COMMENT not in text
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-peerkv-cache"]
