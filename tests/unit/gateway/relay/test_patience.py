"""A request's own deadline for the first byte of its answer: the header x-request-timeout."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.relay_client import COMPLETION
from tests.unit.gateway.relay.test_limits import PROMPT_TOKENS, headers, limited_door, used
from tests.unit.gateway.running_door import Door, running_door, until

PATH = "/v1/completions"
LONG = 60.0


def within(seconds: str, **more: str) -> dict[str, str]:
    return {"x-request-timeout": seconds, **more}


async def stopped(door: Door) -> bool:
    """Whether the engine gave the request up."""
    seen = await door.seen("replica-0")
    return len(seen["aborted"]) == 1 and seen["running"] == 0


@pytest.mark.parametrize("turns", [0, 4])
@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("value", ["soon", "-1", "0", ""])
async def test_a_malformed_one_is_refused_whatever_it_is_for(tmp_path: Path, turns: int, path: str, value: str) -> None:
    async with running_door(tmp_path, replica_requests_max=turns) as door:
        await door.add_engine("replica-0")
        status, body, _ = await door.post(path, COMPLETION, headers=within(value))
        assert (status, "x-request-timeout" in body["error"]["message"]) == (400, True)
        assert (await door.seen("replica-0"))["requests"] == []


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fake", [{"delay": LONG}, {"held": True}, {"token_delay": LONG}])
async def test_an_answer_that_does_not_begin_in_time_is_ended_and_charged_its_prompt(
    tmp_path: Path, stream: bool, fake: dict[str, Any]
) -> None:
    if stream and "token_delay" in fake:
        fake = {**fake, "comments": 1}  # of the engine's own, before its first token
    async with limited_door(tmp_path, limited(tokens_per_minute=1000)) as door:
        body = COMPLETION | {"stream": stream, "fake": fake}
        status, found, sent = await door.post(PATH, body, headers=within("0.3", **headers("a")))
        assert (status, found["error"]["code"], found["error"]["type"]) == (504, "deadline_exceeded", "timeout_error")
        assert "within 0.3 s" in found["error"]["message"]
        assert "retry-after" not in sent
        await until(lambda: stopped(door))
        assert used(door, "tokens_per_minute") == PROMPT_TOKENS  # as if the client had left
        assert door.relay.in_flight == 0
        assert [event[2] for event in door.recorder.events if event[0] == "ended"] != []


async def test_a_stream_that_has_begun_goes_on(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        body = COMPLETION | {"stream": True, "max_tokens": 8, "fake": {"token_delay": 0.1}}
        async with door.session.post(door.url + PATH, json=body, headers=within("0.4")) as answer:
            lines = [line for line in (await answer.text()).splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) == 8 + 1


async def test_an_answer_in_time_is_as_without_it(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        for _ in range(3):
            status, body, _ = await door.post(PATH, COMPLETION, headers=within("30"))
            assert (status, body["choices"][0]["text"]) == (200, "w0 w1 w2 ")


async def test_behind_our_comments_it_comes_as_an_event(tmp_path: Path) -> None:
    async with running_door(tmp_path, sse_keep_alive_seconds=0.02) as door:
        await door.add_engine("replica-0")
        comments = asyncio.create_task(door.relay.keep_alive.run())
        body = COMPLETION | {"stream": True, "fake": {"held": True}}
        async with door.session.post(door.url + PATH, json=body, headers=within("0.5")) as answer:
            *before, last = [line for line in (await answer.text()).splitlines() if line]
        comments.cancel()
        assert answer.status == 200
        assert set(before) == {": keep-alive"}
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"


async def test_what_it_waited_for_its_turn_counts(tmp_path: Path) -> None:
    async with running_door(tmp_path, replica_requests_max=1) as door:
        engine = await door.add_engine("replica-0")
        first = asyncio.create_task(door.post(PATH, COMPLETION | {"fake": {"held": True}}))
        await until(lambda: engine.seen["running"])
        second = asyncio.create_task(door.post(PATH, COMPLETION | {"fake": {"delay": LONG}}, headers=within("2")))
        admission = door.fleets.first.admission
        assert admission is not None
        await until(lambda: admission.shown().waiting_requests)
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(1.0)
        engine.let_go.set()
        status, body, _ = await second
        took = asyncio.get_running_loop().time() - began
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
        assert took < 1.0 + 1.8  # and not a whole 2 s from its turn on
        assert (await first)[0] == 200
        assert admission.shown().waiting_requests == 0


async def test_a_request_that_never_got_its_turn_is_free_and_told_the_seconds_that_it_gave(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=1000), replica_requests_max=1) as door:
        admission = door.fleets.first.admission
        assert admission is not None
        await admission.enter("somebody", 0, 1)
        status, body, _ = await door.post(PATH, COMPLETION, headers=within("0.3", **headers("a")))
        assert (status, body["error"]["code"]) == (503, "queue_full")
        assert "its turn did not come within 0.3 s." in body["error"]["message"]
        assert used(door, "tokens_per_minute") == 0
        admission.leave()


async def test_a_client_that_leaves_before_it_is_over_is_missed_by_nobody(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        asked = asyncio.create_task(door.post(PATH, COMPLETION | {"fake": {"held": True}}, headers=within("0.4")))
        await until(lambda: door.relay.in_flight)
        await asyncio.sleep(0.1)
        asked.cancel()
        await until(lambda: door.relay.in_flight == 0)
        await asyncio.sleep(0.5)
        assert (door.relay.counters.clients_left, door.relay.counters.internal_errors) == (1, 0)
