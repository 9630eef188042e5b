"""The relay over real sockets: answers, leaving clients, tenants, draining."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path
from types import FrameType
from typing import Any

import openai
import pytest

from engine.fleet import ReplicaState
from gateway.http_server.request_cycle import RequestCycle
from gateway.http_server.transaction import Transaction
from gateway.relay.relay import RelayedRequest
from tests.unit.gateway.relay.relay_client import CHAT, COMPLETION, KEYS, client_of, lines_of
from tests.unit.gateway.running_door import Door, running_door, until


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
        status, body, _ = await door.post("/v1/completions", COMPLETION, headers=headers)
        assert (status, body["error"]["type"]) == (403, "permission_error")
        assert "'x-peerkv-replica'" in body["error"]["message"]
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
