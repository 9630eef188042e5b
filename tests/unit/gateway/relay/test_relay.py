"""The relay over real sockets: answers, retries, leaving clients, limits."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import Any

import openai
import pytest

from engine.fleet import ReplicaState
from gateway.api.body import FORBIDDEN_FIELDS
from gateway.http_server.request_cycle import RequestCycle
from gateway.http_server.transaction import Transaction
from gateway.relay.relay import RelayedRequest
from tests.unit.gateway.running_door import Door, end, running_door, until

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 3}
CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
KEYS = [{"name": "a", "api_key": "key-of-a-1"}, {"name": "b", "api_key": "key-of-b-1", "salt": "pepper"}]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        yield door


def client_of(door: Door, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=door.url + "/v1", api_key="none", max_retries=0, **options)


async def lines_of(door: Door, path: str, body: dict[str, Any]) -> list[str]:
    """The data lines of an event stream, to its clean end."""
    async with door.session.post(door.url + path, json=body) as answer:
        assert answer.status == 200
        return [line for line in (await answer.text()).splitlines() if line]


async def test_the_openai_client_gets_a_completion(door: Door) -> None:
    async with client_of(door) as client:
        answer = await client.completions.create(**COMPLETION)
    assert answer.choices[0].text == "w0 w1 w2 "
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_the_openai_client_gets_a_streamed_chat_with_usage(door: Door) -> None:
    async with client_of(door) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content for c in chunks if c.choices) == "w0 w1 w2 "
    assert chunks[-1].usage.completion_tokens == 3


async def test_the_openai_client_gets_embeddings_and_models(door: Door) -> None:
    async with client_of(door) as client:
        embeddings = await client.embeddings.create(model="fake-model", input=["a", "b"], encoding_format="float")
        models = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("fake-model")
    assert [e.embedding for e in embeddings.data] == [[0.5, -0.5], [0.5, -0.5]]
    assert models == ["fake-model"]
    assert one.id == "fake-model"


async def test_embeddings_of_a_model_that_has_none_are_a_clear_error(door: Door) -> None:
    door.fleet.replicas.clear()
    await door.add_engine("replica-0", "--fake-no-embeddings")
    async with client_of(door) as client:
        with pytest.raises(openai.NotFoundError, match="embedding model") as refused:
            await client.embeddings.create(model="fake-model", input="a")
    assert refused.value.code == "unsupported_endpoint"


async def test_a_streamed_answer_ends_with_done(door: Door) -> None:
    lines = await lines_of(door, "/v1/completions", COMPLETION | {"stream": True})
    assert lines[-1] == "data: [DONE]"
    assert len(lines) == 4


async def test_fields_that_the_gateway_does_not_use_reach_the_engine_as_they_are(door: Door) -> None:
    extra = {
        "n": 2,
        "seed": 7,
        "temperature": 0.1,
        "logit_bias": {"5": -1.5},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"ß": "\u2028\x00"}}},
        "a_field_of_tomorrow": [1, 2.5, None, True, 2**64],
    }
    status, _, _ = await door.post("/v1/chat/completions", CHAT | extra)
    assert status == 200
    body = (await door.seen("replica-0"))["requests"][0]["body"]
    body.pop("kv_transfer_params")
    assert body == CHAT | extra


async def test_the_plan_is_written_into_the_body(door: Door) -> None:
    door.planner.prompt = [1, 2, 3]
    await door.post("/v1/completions", COMPLETION)
    body = (await door.seen("replica-0"))["requests"][0]["body"]
    assert body["prompt"] == [1, 2, 3]
    assert body["kv_transfer_params"] == {"peerkv": {"source": "", "tag": "t"}}
    assert "cache_salt" not in body


@pytest.mark.parametrize("name", sorted(FORBIDDEN_FIELDS))
async def test_a_forbidden_field_is_refused_by_name(door: Door, name: str) -> None:
    status, body, _ = await door.post("/v1/completions", COMPLETION | {name: "x"})
    assert status == 400
    assert body["error"]["param"] == name
    assert body["error"]["code"] == "unsupported_parameter"
    assert (await door.seen("replica-0"))["requests"] == []


async def test_a_forbidden_field_that_is_null_does_not_reach_the_engine(door: Door) -> None:
    status, _, _ = await door.post("/v1/completions", COMPLETION | {"cache_salt": None, "priority": None})
    assert status == 200
    assert not {"cache_salt", "priority"} & (await door.seen("replica-0"))["requests"][0]["body"].keys()


async def test_a_forbidden_field_with_vllms_default_is_no_reason_to_refuse(door: Door) -> None:
    defaults = {"priority": 0, "routed_experts_prompt_start": 0, "return_mm_kwargs": False, "mm_payload": "tensors"}
    assert (await door.post("/v1/completions", COMPLETION | defaults))[0] == 200
    assert not defaults.keys() & (await door.seen("replica-0"))["requests"][0]["body"].keys()
    assert (await door.post("/v1/completions", COMPLETION | {"priority": -1}))[0] == 400


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("ids", [None, [1, 2]])
async def test_a_body_in_any_encoding_of_json_reaches_the_engine(door: Door, encoding: str, ids: list[int] | None) -> None:
    door.planner.prompt = ids
    raw = json.dumps(COMPLETION | {"user": "Zoë 🦜"}, ensure_ascii=False).encode(encoding)
    status, _, _ = await door.post("/v1/completions", data=raw, json=None, headers={"content-type": "application/json"})
    assert status == 200
    body = (await door.seen("replica-0"))["requests"][0]["body"]
    assert (body["user"], body["prompt"]) == ("Zoë 🦜", ids or "hello")


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbf", b"\xff\xfe{", '{"prompt":'.encode("utf-16"), b"{\x00", b"\x00\x00\x00{"])
async def test_half_a_body_in_another_encoding_is_400(door: Door, raw: bytes) -> None:
    status, body, _ = await door.post("/v1/completions", data=raw, json=None, headers={"content-type": "application/json"})
    assert (status, body["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    "half", [b"\\ud83d", b"\\ud83d and on", b"\\ude00", b"\xed\xa0\xbd"], ids=["end", "first", "second", "raw"]
)
@pytest.mark.parametrize("ids", [None, [1, 2], [[1], [2]]])
async def test_half_a_surrogate_pair_reaches_the_engine_as_it_came(door: Door, half: bytes, ids: list[Any] | None) -> None:
    door.planner.prompt = ids
    raw = b'{"prompt": "x", "max_tokens": 1, "cache_salt": null, "user": "%b"}' % half
    status, _, _ = await door.post("/v1/completions", data=raw, json=None, headers={"content-type": "application/json"})
    assert status == 200
    assert (await door.seen("replica-0"))["requests"][0]["body"]["user"] == json.loads(raw)["user"]


async def test_half_a_surrogate_pair_in_a_name_is_the_clients_error_and_no_defect(door: Door) -> None:
    raw = b'{"prompt": "x", "model": "\\ud83d"}'
    status, body, _ = await door.post("/v1/completions", data=raw, json=None, headers={"content-type": "application/json"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert door.relay.counters.internal_errors == 0


async def test_a_forbidden_field_cannot_hide_behind_a_duplicate_key(door: Door) -> None:
    raw = '{"prompt": "x", "cache_salt": null, "cache_salt": "other", "max_tokens": 1}'
    status, body, _ = await door.post("/v1/completions", data=raw, json=None, headers={"content-type": "application/json"})
    assert (status, body["error"]["param"]) == (400, "cache_salt")


async def test_a_cached_image_of_somebody_else_cannot_be_named(door: Door) -> None:
    part = {"type": "image_url", "image_url": None, "uuid": "theirs"}
    status, body, _ = await door.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]})
    assert (status, body["error"]["param"]) == (400, "uuid")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"x"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": 5}',
        b'{"prompt": null}',
        b"{}",
        b'{"prompt": "x", "model": 5}',
    ],
    ids=range(15),
)
async def test_a_bad_body_is_the_clients_error(door: Door, raw: bytes) -> None:
    headers = {"content-type": "application/json"}
    status, body, _ = await door.post("/v1/completions", data=raw, json=None, headers=headers)
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
    assert door.relay.counters.internal_errors == 0
    assert (await door.seen("replica-0"))["requests"] == []


async def test_another_content_type_is_refused(door: Door) -> None:
    status, body, _ = await door.post("/v1/completions", data=b"{}", json=None, headers={"content-type": "text/plain"})
    assert (status, body["error"]["code"]) == (400, "invalid_content_type")


async def test_an_unknown_model_is_refused_with_the_list_of_those_served(door: Door) -> None:
    status, body, _ = await door.post("/v1/completions", COMPLETION | {"model": "gpt-5"})
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert "fake-model" in body["error"]["message"]


@pytest.mark.parametrize("model", [None, ""])
async def test_no_model_means_the_default_as_in_vllm(door: Door, model: str | None) -> None:
    status, _, _ = await door.post("/v1/completions", COMPLETION | {"model": model})
    assert status == 200


async def test_an_error_of_the_engine_is_passed_on_as_it_is(door: Door) -> None:
    status, body, _ = await door.post("/v1/completions", COMPLETION | {"prompt": "x" * 3000})
    assert status == 400
    assert body["error"]["code"] is None
    assert "maximum context length is 2048" in body["error"]["message"]
    assert door.relay.counters.retries == 0


async def test_a_sane_request_id_is_kept_everywhere(door: Door) -> None:
    _, body, headers = await door.post("/v1/completions", COMPLETION, headers={"x-request-id": "Abc-1._2"})
    assert headers.getall("x-request-id") == ["Abc-1._2"]
    assert body["id"] == "cmpl-Abc-1._2"
    assert headers["x-peerkv-replica"] == "replica-0"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "ä", 'a"b'])
async def test_a_strange_request_id_is_replaced(door: Door, given: str) -> None:
    _, _, headers = await door.post("/v1/completions", COMPLETION, headers={"x-request-id": given})
    assert len(headers["x-request-id"]) == 32


async def test_new_request_ids_are_all_different(door: Door) -> None:
    answers = [await door.post("/v1/completions", COMPLETION) for _ in range(3)]
    ids = {headers["x-request-id"] for _, _, headers in answers}
    assert len(ids) == 3
    assert all(len(each) == 32 and int(each, 16) for each in ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_leaves_nothing_for_the_garbage_collector(door: Door, stream: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"stream": stream}) as answer:
                await answer.read()
        await until(lambda: not door.server.server_state.tasks)
        left = [kind for each in gc.get_objects() if (kind := type(each)) in (Transaction, RelayedRequest, RequestCycle)]
        assert {Transaction, RelayedRequest}.isdisjoint(left)
        assert len(left) <= 1  # the last cycle of the connection, which is still open
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"prompt": "x", ' + b" " * 100_000, 400),
        (json.dumps(COMPLETION | {"priority": 1}).encode(), 400),
        (json.dumps(COMPLETION | {"prompt": 1}).encode(), 400),
        (json.dumps(COMPLETION | {"model": "another"}).encode(), 404),
        (json.dumps(COMPLETION | {"fake": {"status": 422}}).encode(), 422),
        (json.dumps(COMPLETION | {"fake": {"drop": "before"}}).encode(), 502),
        (json.dumps(COMPLETION | {"stream": True, "fake": {"drop": "middle"}}).encode(), 200),
    ],
)
async def test_a_request_that_fails_leaves_its_body_to_nobody(door: Door, body: bytes, status: int) -> None:
    gc.collect()
    before = kept()
    gc.disable()
    try:
        for _ in range(3):
            sent = {"content-type": "application/json"}
            async with door.session.post(door.url + "/v1/completions", data=body, headers=sent) as answer:
                assert answer.status == status
                await answer.read()
        await until(lambda: not door.server.server_state.tasks)
        assert names_of_new(before) == []
    finally:
        gc.enable()


async def test_a_client_that_leaves_leaves_its_body_to_nobody(door: Door) -> None:
    body = COMPLETION | {"stream": True, "max_tokens": 1000, "fake": {"token_delay": 0.05}}
    gc.collect()
    before = kept()
    gc.disable()
    try:
        async with door.session.post(door.url + "/v1/completions", json=body) as answer:
            await answer.content.readany()
        await until(lambda: door.relay.in_flight == 0 and not door.server.server_state.tasks)
        assert names_of_new(before) == []
    finally:
        gc.enable()


def kept() -> list[Any]:
    """What of requests is there: they themselves, and frames of the gateway that an error's traceback holds."""
    return [
        each
        for each in gc.get_objects()
        if type(each) in (Transaction, RelayedRequest) or (type(each) is FrameType and "/gateway/" in each.f_code.co_filename)
    ]


def names_of_new(before: list[Any]) -> list[str]:
    """What is kept now and was not `before`: errors of other tests may still be there."""
    known = {id(each) for each in before}
    return [
        each.f_code.co_qualname if isinstance(each, FrameType) else type(each).__name__
        for each in kept()
        if id(each) not in known
    ]


async def test_client_headers_do_not_reach_the_engine(door: Door) -> None:
    sent = {"authorization": "Bearer secret", "cookie": "a=b", "x-data-parallel-rank": "1", "x-evil": "1"}
    await door.post("/v1/completions", COMPLETION, headers=sent)
    headers = (await door.seen("replica-0"))["requests"][0]["headers"]
    assert headers.keys() == {"host", "accept", "content-type", "content-length", "x-request-id"}


async def test_a_client_that_leaves_a_stream_cancels_it_in_the_engine(door: Door) -> None:
    body = COMPLETION | {"stream": True, "max_tokens": 1000, "fake": {"token_delay": 0.05}}
    answer = await door.session.post(door.url + "/v1/completions", json=body)
    await answer.content.readany()
    answer.close()
    await until(lambda: door.relay.in_flight == 0, 1.0)

    async def aborted() -> bool:
        return len((await door.seen("replica-0"))["aborted"]) == 1

    await until(aborted, 1.0)
    assert door.relay.counters.clients_left == 1
    assert door.recorder.in_flight == {"replica-0": 0}


@pytest.mark.parametrize("fake", [{"delay": 30}, {"token_delay": 0.05}], ids=["before the head", "while generating"])
async def test_a_client_that_leaves_without_streaming_cancels_too(door: Door, fake: dict[str, float]) -> None:
    request = asyncio.create_task(door.post("/v1/completions", COMPLETION | {"max_tokens": 1000, "fake": fake}))

    async def running() -> bool:
        return bool((await door.seen("replica-0"))["running"] == 1)

    await until(running)
    request.cancel()

    async def aborted() -> bool:
        return len((await door.seen("replica-0"))["aborted"]) == 1

    await until(aborted, 1.0)
    assert door.relay.in_flight == 0
    assert door.recorder.in_flight == {"replica-0": 0}


async def test_a_connection_that_drops_before_the_head_is_tried_again_and_then_elsewhere(door: Door) -> None:
    await door.add_engine("replica-1")
    await door.add_engine("replica-2")
    fake = {"on": "replica-0", "drop": "before"}
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": fake})
    assert status == 200
    assert headers["x-peerkv-replica"] == "replica-1"
    assert len((await door.seen("replica-0"))["requests"]) == 2  # the first connection was not new, and may have been stale
    assert door.fleet.suspects == ["replica-0"]
    assert door.recorder.in_flight == {"replica-0": 0, "replica-1": 0}


async def test_a_request_that_ends_its_replicas_ends_two_at_most_and_not_the_last_one(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        processes = [await door.add_process(f"replica-{i}") for i in range(3)]
        status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"die": "before"}})
        assert (status, body["error"]["code"], int(headers["retry-after"]) > 0) == (502, "replica_lost", True)
        assert [await process.wait() for process in processes[:2]] == [9, 9]
        door.fleet.set_state("replica-0", ReplicaState.BACKOFF)
        door.fleet.set_state("replica-1", ReplicaState.STARTING)
        assert (await door.seen("replica-2"))["requests"] == []


async def test_with_one_replica_left_a_request_that_may_have_ended_the_other_goes_no_further(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"die": "before"}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert await process.wait() == 9
        assert (await door.seen("replica-1"))["requests"] == []


async def test_a_request_that_its_replica_had_borne_goes_to_the_last_one_too(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        door.recorder.borne = True
        waits = asyncio.create_task(door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "delay": 60}}))
        await until(lambda: door.recorder.in_flight.get("replica-0"))
        process.kill()
        status, body, _ = await waits
        assert (status, body["system_fingerprint"]) == (200, "replica-1")


async def test_an_engine_that_ended_is_a_lost_replica_whatever_its_server_answers(tmp_path: Path) -> None:
    """vLLM's server answers 500 to what its dead engine held, and ends."""
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"engine_died": True}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert (await door.seen("replica-1"))["requests"] == []


async def test_requests_that_wait_for_a_replica_can_be_moved_while_nothing_of_an_answer_came(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        slow = COMPLETION | {"fake": {"on": "replica-0", "delay": 60}}
        begun = COMPLETION | {"stream": True, "max_tokens": 500, "fake": {"token_delay": 0.01}}
        whole, silent = (asyncio.create_task(door.post("/v1/completions", body)) for body in (slow, slow))
        pinned = asyncio.create_task(door.post("/v1/completions", slow, headers={"x-peerkv-replica": "replica-0"}))
        async with door.session.post(door.url + "/v1/completions", json=begun) as stream:
            await stream.content.readany()
            await until(lambda: door.recorder.in_flight["replica-0"] == 4)
            await until(lambda: door.upstream.give_up("replica-0", "it stands still") == 2)
            for status, body, _ in (await whole, await silent):
                assert (status, body["system_fingerprint"]) == (200, "replica-1")
            assert door.recorder.in_flight["replica-0"] == 2
            assert await stream.content.readany()
        pinned.cancel()


async def test_an_answer_of_429_is_tried_elsewhere(door: Door) -> None:
    await door.add_engine("replica-1")
    status, _, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "status": 429}})
    assert (status, headers["x-peerkv-replica"]) == (200, "replica-1")


async def test_out_of_descriptors_a_request_waits_for_one_and_blames_no_replica(tmp_path: Path) -> None:
    async with running_door(tmp_path, connect_seconds=0.5) as door:
        await door.add_process("replica-0")
        await door.post("/v1/completions", COMPLETION)
        async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"fake": {"delay": 0.3}}) as warm:
            await warm.read()
        for connections in door.upstream._idle.values():
            connections.clear()  # closed neither here nor there: they hold their descriptors
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        os.close(least_free := os.dup(0))
        resource.setrlimit(resource.RLIMIT_NOFILE, (least_free, hard))
        try:
            status, body, _ = await door.post("/v1/completions", COMPLETION)
            assert (status, "Too many open files" in body["error"]["message"]) == (503, True)
            asked = asyncio.create_task(door.post("/v1/completions", COMPLETION))
            await until(lambda: door.relay.in_flight)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (await asked)[0] == 200
        assert door.fleet.suspects == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_replica_that_dies_before_the_first_byte_is_replaced(tmp_path: Path, stream: bool) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        await door.add_engine("replica-2")
        fake = {"on": "replica-0", "die": "mid", "after": 0}
        lines = await lines_of(door, "/v1/completions", COMPLETION | {"stream": stream, "fake": fake})
        assert await process.wait() == 9
        assert ("[DONE]" in lines[-1]) == stream
        assert '"system_fingerprint": "replica-1"' in lines[0]
        assert door.relay.counters.retries == 1


async def test_a_whole_answer_that_breaks_off_is_made_anew_elsewhere(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_process("replica-0")
        await door.add_engine("replica-1")
        door.recorder.borne = True
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"on": "replica-0", "die": "mid"}})
        assert (status, body["system_fingerprint"]) == (200, "replica-1")


async def test_a_stream_that_breaks_midway_ends_with_an_error_event_and_no_done(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_process("replica-0")
        await door.add_engine("replica-1")
        fake = {"on": "replica-0", "die": "mid", "after": 2, "token_delay": 0.02}
        lines = await lines_of(door, "/v1/completions", COMPLETION | {"stream": True, "max_tokens": 9, "fake": fake})
        texts = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert [t["choices"][0]["text"] for t in texts[:-1]] == ["w0 ", "w1 "]
        assert texts[-1]["error"]["code"] == "replica_lost"
        assert door.relay.counters.streams_broken == 1


async def test_the_openai_client_raises_on_a_stream_that_breaks(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door, client_of(door) as client:
        await door.add_process("replica-0")
        fake = {"fake": {"die": "mid", "after": 2, "token_delay": 0.02}}
        stream = await client.completions.create(**COMPLETION, stream=True, extra_body=fake)
        with pytest.raises(openai.APIError, match="lost"):
            async for _ in stream:
                pass


async def test_a_killed_replica_with_idle_connections_costs_nobody_an_error(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        process = await door.add_process("replica-0")
        await door.add_engine("replica-1")
        await asyncio.gather(*(door.post("/v1/completions", COMPLETION) for _ in range(5)))
        await end(process)
        answers = await asyncio.gather(*(door.post("/v1/completions", COMPLETION) for _ in range(5)))
        assert {(status, headers["x-peerkv-replica"]) for status, _, headers in answers} == {(200, "replica-1")}


async def test_when_the_only_replica_dies_the_answer_is_502_with_retry_after(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_process("replica-0")
        status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"die": "before"}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert int(headers["retry-after"]) > 0


async def test_a_lone_replica_that_breaks_off_and_stays_ready_is_lost_and_not_unready(door: Door) -> None:
    status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"drop": "mid", "after": 1}})
    assert (status, body["error"]["code"]) == (502, "replica_lost")
    assert int(headers["retry-after"]) > 0


async def test_traces_are_continued_by_the_engine_and_other_headers_stay_here(door: Door) -> None:
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=1,b=2"}
    for _ in range(2):  # the second head is known by its bytes
        await door.post("/v1/completions", COMPLETION, headers=trace | {"x-session-id": "1", "baggage": "a=b"})
    for request in (await door.seen("replica-0"))["requests"]:
        assert trace.items() <= request["headers"].items()
        assert not {"x-session-id", "baggage"} & request["headers"].keys()


async def test_an_engines_refusal_has_openais_form_and_vllms_message(door: Door) -> None:
    vllms = {
        "error": {
            "message": "max_tokens must be at least 1",
            "type": "BadRequestError",
            "param": "body.max_tokens",
            "code": 400,
        }
    }
    status, body, headers = await door.post("/v1/completions", COMPLETION | {"fake": {"status": 400, "error": vllms}})
    told = {"message": "max_tokens must be at least 1", "type": "invalid_request_error", "param": "max_tokens", "code": None}
    assert (status, body) == (400, {"error": told})
    assert headers["content-type"] == "application/json"
    async with client_of(door) as client:
        with pytest.raises(openai.BadRequestError, match="at least 1") as refused:
            await client.completions.create(**COMPLETION, extra_body={"fake": {"status": 400, "error": vllms}})
    assert (refused.value.type, refused.value.param, refused.value.code) == ("invalid_request_error", "max_tokens", None)


async def test_no_replica_ready_is_503_with_retry_after(door: Door) -> None:
    await door.post("/v1/completions", COMPLETION)
    door.fleet.set_state("replica-0", ReplicaState.BACKOFF)
    status, body, headers = await door.post("/v1/completions", COMPLETION)
    assert (status, body["error"]["code"]) == (503, "no_replica_ready")
    assert int(headers["retry-after"]) > 0


async def test_a_500_is_tried_elsewhere_and_passed_on_when_there_is_no_elsewhere(door: Door) -> None:
    fake = {"fake": {"on": "replica-0", "status": 500}}
    status, body, _ = await door.post("/v1/completions", COMPLETION | fake)
    assert (status, body["error"]["message"]) == (500, "as you asked")
    await door.add_engine("replica-1")
    status, _, headers = await door.post("/v1/completions", COMPLETION | fake)
    assert (status, headers["x-peerkv-replica"]) == (200, "replica-1")


async def test_retries_are_bounded(tmp_path: Path) -> None:
    async with running_door(tmp_path, retry_attempts_max=1) as door:
        for i in range(3):
            await door.add_engine(f"replica-{i}")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"drop": "before"}})
        assert (status, body["error"]["code"]) == (502, "replica_lost")
        assert [p.replica.name for p in door.planner.plans] == ["replica-0", "replica-1"]


async def test_a_replica_that_does_not_begin_in_time_is_504(tmp_path: Path) -> None:
    async with running_door(tmp_path, response_head_seconds_max=0.1) as door:
        await door.add_engine("replica-0")
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"fake": {"delay": 30}})
        assert (status, body["error"]["code"]) == (504, "replica_timeout")


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


async def chunks_of(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 1024):
        yield b"x" * 1024


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


async def test_tenants_need_their_key_and_get_their_salt(tmp_path: Path) -> None:
    async with running_door(tmp_path, tenants=KEYS) as door:
        await door.add_engine("replica-0")
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic key-of-a-1"}):
            status, body, answered = await door.post("/v1/completions", COMPLETION, headers=headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert answered["www-authenticate"] == "Bearer"
            assert (await door.get("/v1/models", headers=headers))[0] == 401
        for key in ("key-of-a-1", "key-of-b-1"):
            assert (await door.post("/v1/completions", COMPLETION, headers={"authorization": f"Bearer {key}"}))[0] == 200
        salts = [request["body"]["cache_salt"] for request in (await door.seen("replica-0"))["requests"]]
        assert len(salts[0]) == 64
        assert "key-of-a-1" not in salts[0]
        assert salts[1] == "pepper"


async def test_a_request_can_be_pinned_to_a_replica(door: Door) -> None:
    await door.add_engine("replica-1")
    _, _, headers = await door.post("/v1/completions", COMPLETION, headers={"x-peerkv-replica": "replica-1"})
    assert headers["x-peerkv-replica"] == "replica-1"
    status, body, _ = await door.post("/v1/completions", COMPLETION, headers={"x-peerkv-replica": "nobody"})
    assert (status, body["error"]["code"]) == (400, "unknown_replica")
    door.fleet.set_state("replica-1", ReplicaState.STARTING)
    status, body, _ = await door.post("/v1/completions", COMPLETION, headers={"x-peerkv-replica": "replica-1"})
    assert (status, body["error"]["code"]) == (503, "replica_not_ready")


async def test_a_pinned_request_is_not_moved_to_another_replica(door: Door) -> None:
    await door.add_engine("replica-1")
    pinned = {"x-peerkv-replica": "replica-0"}
    fake = {"fake": {"on": "replica-0", "drop": "before"}}
    status, body, _ = await door.post("/v1/completions", COMPLETION | fake, headers=pinned)
    assert (status, body["error"]["code"]) == (502, "replica_lost")


async def test_pinning_needs_the_admin_key_where_there_is_one(tmp_path: Path) -> None:
    async with running_door(tmp_path, admin_key="admin-key-1") as door:
        await door.add_engine("replica-0")
        headers = {"x-peerkv-replica": "replica-0"}
        assert (await door.post("/v1/completions", COMPLETION, headers=headers))[0] == 401
        headers["authorization"] = "Bearer admin-key-1"
        assert (await door.post("/v1/completions", COMPLETION, headers=headers))[0] == 200


async def test_a_defect_is_a_500_that_tells_nothing_of_the_inside(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    door.planner.error = RuntimeError("secret detail")
    status, body, headers = await door.post("/v1/completions", COMPLETION)
    assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "secret" not in body["error"]["message"]
    assert headers["x-request-id"] in body["error"]["message"]
    assert "secret detail" in caplog.text


async def test_draining_takes_nothing_new_and_ends_what_takes_too_long(door: Door) -> None:
    long = {"max_tokens": 1000, "fake": {"token_delay": 0.02}}
    stream = asyncio.create_task(lines_of(door, "/v1/completions", COMPLETION | long | {"stream": True}))
    whole = asyncio.create_task(door.post("/v1/completions", COMPLETION | long))

    async def running() -> bool:
        return bool((await door.seen("replica-0"))["running"] == 2)

    await until(running)
    drained = asyncio.create_task(door.relay.drain(0.3))
    await until(lambda: door.relay.draining)
    assert (await door.post("/v1/completions", COMPLETION))[0] == 503
    await drained
    assert door.relay.in_flight == 0  # told, before anything of ours is closed
    assert json.loads((await stream)[-1].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert (await whole)[0] == 503


async def test_models_are_asked_again_when_the_fleet_changes(door: Door) -> None:
    engine = await door.add_engine("replica-1")
    assert [m["id"] for m in (await door.get("/v1/models"))[1]["data"]] == ["fake-model"]
    assert (await door.get("/v1/models/adapter"))[0] == 404
    door.fleet.set_state("replica-0", ReplicaState.STOPPED)
    engine.loras.append("adapter")
    status, body, _ = await door.get("/v1/models/adapter")
    assert (status, body["parent"]) == (200, "fake-model")


async def test_models_before_any_replica_is_ready_is_503(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        status, body, _ = await door.get("/v1/models")
        assert (status, body["error"]["code"]) == (503, "no_replica_ready")
