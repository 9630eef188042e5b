"""Streams whose engine dies under way: another one goes on with them, or the client is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.relay import answer
from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import no_keys
from tests.fake_engine import FIRST_WORD, render
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.relay_client import lines_of
from tests.unit.gateway.running_door import Door, running_door, until

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": True}
CHAT_MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "fake-model", "messages": CHAT_MESSAGES, "max_tokens": 8, "temperature": 0, "stream": True}
USAGE = {"stream_options": {"include_usage": True}}
TEXT = "w0 w1 w2 w3 w4 w5 w6 w7 "
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
Json = dict[str, Any]


def asking(body: Json, on: str = "replica-0", **fake: Any) -> Json:
    """The body, with what is asked of the fake engine `on` in a field that a request may have."""
    return body | {"user": json.dumps({"on": on, **fake})}


def events(lines: list[str]) -> list[Json]:
    """The events of a stream that ends as it should."""
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(found: list[Json]) -> str:
    choices = [choice for event in found for choice in event["choices"]]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def failure(lines: list[str]) -> str:
    """The code of the error that a stream ends with."""
    code: str = json.loads(lines[-1].removeprefix("data: "))["error"]["code"]
    return code


LIMITS = {"requests_per_minute": 9, "tokens_per_minute": 1000, "tokens_in_flight_max": 500}


def authorized(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@asynccontextmanager
async def two_engines(directory: Path) -> AsyncIterator[Door]:
    """A front door that knows a key with limits, and one without."""
    keys = directory / "keys.toml"
    write_keys(keys, no_keys().with_key(limited("limited", **LIMITS)).with_key(limited("free")))
    async with running_door(directory, keys_file=keys) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        yield door


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        yield door


@pytest.mark.parametrize("form", ["completions", "chat"])
@pytest.mark.parametrize("after", [1, 2, 7])
async def test_another_replica_goes_on_behind_the_tokens_that_were_sent(door: Door, form: str, after: int) -> None:
    body = asking((COMPLETION if form == "completions" else CHAT) | USAGE, drop="mid", after=after)
    found = events(await lines_of(door, PATHS[form], body))
    assert text_of(found) == TEXT
    assert len({event["id"] for event in found}) == len({event["created"] for event in found}) == 1
    *_, usage = found
    prompt = len("hello") if form == "completions" else len(render(CHAT_MESSAGES))
    assert usage["choices"] == []
    assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (prompt, 8)
    assert usage["usage"]["total_tokens"] == prompt + 8
    assert sum("usage" in event and event["usage"] is not None for event in found) == 1
    assert not any(choice.get("token_ids") for event in found for choice in event["choices"])
    (second,) = (await door.seen("replica-1"))["requests"]
    ids = second["body"]["prompt"] if form == "completions" else second["body"]["kv_transfer_params"]["prompt_token_ids"]
    assert ids[prompt:] == [FIRST_WORD + i for i in range(after)]
    assert second["body"]["max_tokens" if form == "completions" else "max_completion_tokens"] == 8 - after
    assert door.relay.counters.streams_continued == 1
    assert door.relay.counters.streams_broken == 0
    assert [event[2] for event in door.recorder.events if event[0] == "ended"] == [0, 200]


async def test_what_became_of_a_stream_whose_replica_was_lost_is_logged(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    await lines_of(door, PATHS["completions"], asking(COMPLETION, drop="mid", after=3))
    assert [line.split(" ", 2)[2] for line in caplog.messages if "continued" in line] == ["is continued on replica-1"]
    assert not [line for line in caplog.messages if "broken off" in line]
    sampled = asking(COMPLETION | {"temperature": 1}, drop="mid", after=3)
    assert failure(await lines_of(door, PATHS["completions"], sampled)) == "replica_lost"
    assert len([line for line in caplog.messages if line.endswith("is broken off: no other replica can go on with it")]) == 1


PARTIAL = {"da": 0.01, "within_its_json": 0.6, "without_its_last_byte": 1.0}


@pytest.mark.parametrize("partial", PARTIAL.values(), ids=PARTIAL)
@pytest.mark.parametrize("form", ["completions", "chat"])
@pytest.mark.parametrize("key", ["limited", "free"])
async def test_an_event_that_broke_off_is_made_again(tmp_path: Path, form: str, partial: float, key: str) -> None:
    """A client that did not ask for the usage of its limited key has its events looked through for it."""
    async with two_engines(tmp_path) as door:
        asked = {"on": "replica-0", "drop": "mid", "after": 3, "partial": partial}
        body = (COMPLETION if form == "completions" else CHAT) | {"user": json.dumps(asked)}
        lines = await lines_of(door, PATHS[form], body, headers=authorized(key))
        assert text_of(events(lines)) == TEXT
        assert [line[:7] for line in lines] == ["data: {"] * 8 + ["data: ["]
        assert door.relay.counters.streams_continued == 1
        assert "usage" not in "".join(lines)


async def test_a_stream_that_was_continued_is_charged_once_for_all_that_it_used(tmp_path: Path) -> None:
    async with two_engines(tmp_path) as door:
        body = asking(COMPLETION, drop="mid", after=3)
        assert text_of(events(await lines_of(door, PATHS["completions"], body, headers=authorized("limited")))) == TEXT
        assert door.relay.counters.streams_continued == 1
        await until(lambda: not door.limiter.book.under_way())
        (tenant,) = door.limiter.uses()
        assert (tenant.requests, tenant.uncached_tokens + tenant.cached_tokens) == (1, len("hello"))
        assert (tenant.generated_tokens, tenant.charged_tokens) == (8, len("hello") + 8)
        (key,) = tenant.keys
        assert key.requests_in_flight == 0
        assert {name: limit.used for name, limit in key.limits.items()} == {
            "requests_per_minute": 1,
            "tokens_per_minute": len("hello") + 8,
            "tokens_in_flight_max": 0,
        }


@pytest.mark.parametrize("form", ["completions", "chat"])
async def test_where_both_engines_live_neither_has_the_request_afterwards(door: Door, form: str) -> None:
    body = asking(COMPLETION if form == "completions" else CHAT, drop="mid", after=3, token_delay=0.01)
    assert text_of(events(await lines_of(door, PATHS[form], body))) == TEXT

    async def nobody_runs() -> bool:
        return not any([(await door.seen(name))["running"] for name in ("replica-0", "replica-1")])

    await until(nobody_runs)
    seen = [await door.seen(name) for name in ("replica-0", "replica-1")]
    assert [each["finished"] for each in seen] == [0, 1]
    assert door.relay.in_flight == 0


async def test_the_process_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        body = asking(COMPLETION | {"max_tokens": 200}, token_delay=0.01)
        streamed = asyncio.create_task(lines_of(door, "/v1/completions", body))
        await until(lambda: door.relay.in_flight)
        await asyncio.sleep(0.3)
        process.kill()
        assert text_of(events(await streamed)) == "".join(f"w{i} " for i in range(200))


async def test_a_client_that_wants_ids_gets_each_once(door: Door) -> None:
    body = asking(COMPLETION | {"return_token_ids": True}, drop="mid", after=3)
    found = events(await lines_of(door, "/v1/completions", body))
    ids = [each for event in found for choice in event["choices"] for each in choice["token_ids"]]
    assert ids == [FIRST_WORD + i for i in range(8)]
    prompts = [choice.get("prompt_token_ids") for event in found for choice in event["choices"]]
    assert prompts[0] == list(b"hello")
    assert not any(prompts[1:])


async def test_an_engine_that_says_itself_that_it_died_is_replaced_too(door: Door) -> None:
    body = asking(COMPLETION, engine_dies_at=4)
    assert text_of(events(await lines_of(door, "/v1/completions", body))) == TEXT


@pytest.mark.parametrize(
    ("ends", "more"),
    [({"engine_dies_at": 0}, {}), ({"engine_dies_at": 0}, {"temperature": 0.7}), ({"aborts_at": 0}, {})],
    ids=["died", "died_sampling", "stopped"],
)
@pytest.mark.parametrize("borne", [True, False])
async def test_an_engine_that_says_so_before_its_first_token_is_as_one_that_broke_off(
    door: Door, ends: Json, more: Json, borne: bool
) -> None:
    door.recorder.borne = borne
    body = asking(COMPLETION | more, **ends)
    if borne:
        assert text_of(events(await lines_of(door, "/v1/completions", body))) == TEXT
        assert door.relay.counters.retries == 1
    else:  # the request may be what ended it
        status, found, _ = await door.post("/v1/completions", body)
        assert (status, found["error"]["code"]) == (502, "replica_lost")
        assert (await door.seen("replica-1"))["requests"] == []
    assert (door.relay.counters.streams_continued, door.relay.counters.streams_broken) == (0, 0)


async def test_an_engine_that_is_stopped_under_way_is_replaced_too(door: Door) -> None:
    assert text_of(events(await lines_of(door, "/v1/completions", asking(COMPLETION, aborts_at=4)))) == TEXT
    assert door.relay.counters.streams_continued == 1


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.7},
        {"temperature": None},
        {"temperature": 0.7, "seed": 1},
        {"n": 2},
        {"logprobs": 1},
        {"logprobs": 0},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"bad_words": ["no such"]},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"echo": True},
        {"some_field_of_tomorrow": 1},
        {"min_p": 0.1, "temperature": 1e-9},
    ],
    ids=lambda more: "_".join(f"{name}_{value}" for name, value in more.items())[:40],
)
async def test_what_cannot_be_continued_exactly_ends_with_an_error(door: Door, more: Json) -> None:
    body = asking(COMPLETION | more, drop="mid", after=3)
    lines = await lines_of(door, "/v1/completions", body)
    assert failure(lines) == "replica_lost"
    assert (await door.seen("replica-1"))["requests"] == []
    assert "return_token_ids" not in (await door.seen("replica-0"))["requests"][0]["body"]


async def test_an_engines_own_word_that_it_ended_is_told_as_a_lost_replica_where_nothing_goes_on(door: Door) -> None:
    lines = await lines_of(door, "/v1/completions", asking(COMPLETION | {"temperature": 0.7, "seed": 1}, engine_dies_at=4))
    assert failure(lines) == "replica_lost"
    assert "EngineCore" not in "".join(lines)
    assert len([line for line in lines if '"text"' in line]) == 4


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
async def test_a_chat_that_has_to_call_a_tool_ends_with_an_error(door: Door, choice: Any) -> None:
    """The engine guides its decoding by a grammar, whose state another one would not have."""
    asked = {"drop_on": "replica-0", "drop": "mid", "after": 3, "calls_from": 0}
    body = CHAT | {"tools": [TOOL], "tool_choice": choice, "user": json.dumps(asked)}
    lines = await lines_of(door, PATHS["chat"], body)
    assert failure(lines) == "replica_lost"
    assert len(lines) == 3 + 1
    assert (await door.seen("replica-1"))["requests"] == []


@pytest.mark.parametrize("after", [1, 4, 7])
async def test_a_chat_with_tools_is_made_anew_and_the_client_gets_what_it_lacks(door: Door, after: int) -> None:
    body = asking(CHAT | USAGE | {"tools": [TOOL]}, drop="mid", after=after, calls_from=3)
    body["user"] = json.dumps({"drop_on": "replica-0", "drop": "mid", "after": after, "calls_from": 3})
    found = events(await lines_of(door, PATHS["chat"], body))
    assert text_of(found) == "w0 w1 w2 "
    calls = [call for event in found for choice in event["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert "".join(call["function"]["arguments"] for call in calls) == "w3 w4 w5 w6 w7 "
    ids = [call["id"] for call in calls if "id" in call]
    assert ids == [f"call-of-replica-{0 if after > 3 else 1}"]
    assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["f"]
    assert len({event["id"] for event in found}) == len({event["created"] for event in found}) == 1
    assert [event["usage"]["completion_tokens"] for event in found if not event["choices"]] == [8]
    (second,) = (await door.seen("replica-1"))["requests"]
    assert second["body"]["max_tokens"] == 8
    assert "return_token_ids" not in second["body"]


async def test_a_chat_that_is_made_anew_and_differs_ends_with_an_error(door: Door) -> None:
    body = CHAT | {"tools": [TOOL], "user": json.dumps({"drop_on": "replica-0", "drop": "mid", "after": 3, "calls_from": 9})}
    (await door.add_engine("replica-1")).prefix = "other "
    lines = await lines_of(door, PATHS["chat"], body)
    assert failure(lines) == "replica_lost"
    assert "other" not in "".join(lines)


async def test_a_stream_is_continued_once(door: Door) -> None:
    await door.add_engine("replica-2")
    body = COMPLETION | {"user": json.dumps({"drop": "mid", "after": 3})}  # on every engine
    lines = await lines_of(door, "/v1/completions", body)
    assert failure(lines) == "replica_lost"
    assert (await door.seen("replica-2"))["requests"] == []
    assert (door.relay.counters.streams_continued, door.relay.counters.streams_broken) == (1, 1)


@pytest.mark.parametrize("ended_before", [True, False])
async def test_a_request_on_which_a_replica_ended_before_is_not_continued(tmp_path: Path, ended_before: bool) -> None:
    async with running_door(tmp_path) as door:
        first = await door.add_process("replica-0")
        for name in ("replica-1", "replica-2"):
            await door.add_engine(name)
        cut = {"drop": "mid", "after": 3}
        by = {"replica-0": {"die": "before"}, "replica-1": cut} if ended_before else {"replica-0": cut}
        lines = await lines_of(door, "/v1/completions", COMPLETION | {"user": json.dumps({"by": by})})
        if ended_before:  # one more replica was tried, and the stream began there
            assert await first.wait() == 9
            assert failure(lines) == "replica_lost"
            assert (await door.seen("replica-2"))["requests"] == []
        else:
            assert text_of(events(lines)) == TEXT


async def test_without_another_replica_the_client_is_told(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        lines = await lines_of(door, "/v1/completions", asking(COMPLETION, drop="mid", after=3))
        assert failure(lines) == "replica_lost"


async def test_another_engine_that_refuses_is_told_as_a_lost_replica(door: Door) -> None:
    body = COMPLETION | {"user": json.dumps({"drop": "mid", "after": 3})}
    engine = await door.add_engine("replica-1")
    engine.status = 503
    assert failure(await lines_of(door, "/v1/completions", body)) == "replica_lost"


@pytest.mark.parametrize("usage", [True, False])
async def test_an_engine_that_dies_behind_the_last_token_is_missed_by_nobody(door: Door, usage: bool) -> None:
    body = asking(COMPLETION | (USAGE if usage else {}), drop="last")
    found = events(await lines_of(door, "/v1/completions", body))
    assert text_of(found) == TEXT
    assert found[-1].get("usage", {}).get("completion_tokens") == (8 if usage else None)
    assert (await door.seen("replica-1"))["requests"] == []


async def test_an_engine_that_dies_behind_the_last_event_is_missed_by_nobody(door: Door) -> None:
    lines = await lines_of(door, "/v1/completions", asking(COMPLETION | USAGE, drop="done"))
    assert text_of(events(lines)) == TEXT
    assert lines.count("data: [DONE]") == 1
    assert door.relay.counters.streams_broken == 0


async def test_the_usage_is_sent_once(door: Door) -> None:
    found = events(await lines_of(door, "/v1/completions", asking(COMPLETION | USAGE, drop="usage")))
    assert [event["usage"]["total_tokens"] for event in found if not event["choices"]] == [len("hello") + 8]
    assert (await door.seen("replica-1"))["requests"] == []


@pytest.mark.parametrize("held_seconds", [15.0, 0.0])
async def test_comments_of_the_other_engine_are_no_second_answer(
    door: Door, monkeypatch: pytest.MonkeyPatch, held_seconds: float
) -> None:
    monkeypatch.setattr(answer, "COMMENTS_HELD_SECONDS", held_seconds)
    by = {"replica-0": {"drop": "mid", "after": 3}, "replica-1": {"comments": 2, "token_delay": 0.01}}
    lines = await lines_of(door, "/v1/completions", COMPLETION | {"user": json.dumps({"by": by})})
    assert text_of(events([line for line in lines if line != ": keep-alive"])) == TEXT
    assert lines.count(": keep-alive") == (0 if held_seconds else 2)
    assert door.relay.counters.internal_errors == 0


async def test_a_client_that_leaves_during_the_switch_is_served_no_longer(door: Door) -> None:
    by = {"replica-0": {"drop": "mid", "after": 3}, "replica-1": {"delay": 60}}

    async def running() -> int:
        return int((await door.seen("replica-1"))["running"])

    async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"user": json.dumps({"by": by})}) as answer:
        async for line in answer.content:
            if b"w2" in line:
                break
        await until(running)
    await until(lambda: door.relay.in_flight == 0)

    async def nobody_runs() -> bool:
        return await running() == 0

    await until(nobody_runs)
    assert (door.relay.counters.clients_left, door.relay.counters.streams_continued) == (1, 1)


async def test_the_switch_can_be_turned_off(tmp_path: Path) -> None:
    async with running_door(tmp_path, continue_streams=False) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        lines = await lines_of(door, "/v1/completions", asking(COMPLETION, drop="mid", after=3))
        assert failure(lines) == "replica_lost"
        assert "return_token_ids" not in (await door.seen("replica-0"))["requests"][0]["body"]
