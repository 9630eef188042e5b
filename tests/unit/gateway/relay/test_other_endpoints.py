"""The endpoints beside OpenAI's older ones, over the real front door and fake engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.api.endpoints import ENDPOINTS, PATHS
from gateway.relay.kept_responses import keeper, new_id, owner_of
from gateway.tenants.tenants import TenantContext
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.test_limits import headers, limited_door, used
from tests.unit.gateway.running_door import Door, running_door

HI = [{"role": "user", "content": "hello"}]
MESSAGES = {"model": "fake-model", "max_tokens": 3, "messages": HI}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hello", "max_output_tokens": 3},
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": {"model": "fake-model", "messages": HI},
    "/tokenize": {"prompt": "hello"},
    "/detokenize": {"tokens": [104, 105]},
    "/pooling": {"input": "hello"},
    "/score": {"text_1": "a", "text_2": "b"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/rerank": {"query": "q", "documents": ["one", "two"]},
    "/v1/rerank": {"query": "q", "documents": ["one", "two"]},
}
TENANTS = [{"name": "acme", "api_key": "acme-key"}, {"name": "other", "api_key": "other-key"}]
ACME, OTHER = ({"authorization": f"Bearer {name}-key"} for name in ("acme", "other"))


def test_each_path_of_vllm_is_of_one_endpoint() -> None:
    assert len(PATHS) == sum(len(traits.paths) for traits in ENDPOINTS.values())
    assert BODIES.keys() | {"/v1/completions", "/v1/chat/completions", "/v1/embeddings"} == PATHS.keys() - set(
        ENDPOINTS["audio"].paths
    )


@pytest.mark.parametrize("path", BODIES)
async def test_an_endpoint_is_passed_on_with_the_tenants_salt_where_it_has_a_cache(path: str, tmp_path: Path) -> None:
    async with running_door(tmp_path, tenants=TENANTS) as door:
        engine = await door.add_engine("replica-0")
        assert (await door.post(path, BODIES[path]))[0] == 401
        status, answer, heads = await door.post(path, BODIES[path], headers=ACME)
        assert status == 200, answer
        assert heads["x-peerkv-replica"] == "replica-0"
        seen: dict[str, Any] = engine.seen["requests"][0] if path != "/tokenize" else {"path": path, "body": {}}
        assert seen["path"] == path
        if ENDPOINTS[PATHS[path]].takes_salt:
            assert door.planner.plans[0].cache_salt == seen["body"]["cache_salt"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("field", ["cache_salt", "kv_transfer_params", "vllm_xargs", "request_id"])
async def test_an_endpoint_takes_no_field_that_reaches_into_the_engine(path: str, field: str, door: Door) -> None:
    status, answer, _ = await door.post(path, {**BODIES[path], field: {"x": 1}})
    assert status == 400
    assert field in answer["error"]["message"]
    assert answer["error"].get("code") == "unsupported_parameter"


@pytest.mark.parametrize("path", BODIES)
async def test_an_endpoint_takes_post_alone(path: str, door: Door) -> None:
    status, answer, heads = await door.get(path)
    assert (status, heads["allow"]) == (405, "POST"), answer


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_errors_of_the_messages_api_have_its_form(path: str, tmp_path: Path) -> None:
    async with running_door(tmp_path, tenants=TENANTS) as door:
        assert (await door.post(path, BODIES[path]))[:2] == (
            401,
            {
                "type": "error",
                "error": {
                    "type": "authentication_error",
                    "message": "No API key given. Send 'Authorization: Bearer <key>'.",
                    "code": "invalid_api_key",
                    "param": None,
                },
            },
        )
        status, answer, _ = await door.post(path, BODIES[path], headers={"x-api-key": "acme-key"})
        assert (status, answer["error"]["type"]) == (503, "overloaded_error")
        await door.add_engine("replica-0")
        assert (await door.post(path, BODIES[path], headers={"x-api-key": "acme-key"}))[0] == 200
        status, answer, _ = await door.post(path, {**BODIES[path], "model": "none"}, headers={"x-api-key": "acme-key"})
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (404, "not_found_error", "model_not_found")


async def test_an_engines_error_of_the_messages_api_keeps_its_words(door: Door) -> None:
    status, answer, _ = await door.post("/v1/messages", {**MESSAGES, "fake": {"status": 400}})
    assert status == 400
    assert answer == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "as you asked", "code": None, "param": None},
    }


@pytest.mark.parametrize(("path", "error"), [("/v1/messages", "api_error"), ("/v1/responses", "error")])
async def test_a_stream_that_breaks_off_ends_with_an_error_event_of_its_api(path: str, error: str, door: Door) -> None:
    body = {**BODIES[path], "stream": True, "fake": {"after": 2}}
    async with door.session.post(door.url + path, json=body) as answer:
        text = await answer.text()
    name, data = text.strip().split("\n\n")[-1].split("\n")
    assert name == "event: error"
    found = json.loads(data.removeprefix("data: "))
    assert found["type"] == "error"
    assert (found["error"]["type"] if path == "/v1/messages" else found["type"]) == error
    assert found["error"]["code"] == "replica_lost"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_limited_key_is_charged_what_the_answer_says(path: str, stream: bool, tmp_path: Path) -> None:
    """Of five bytes of a prompt one is cached, at a tenth; whatever the client put into fields that are repeated to it."""
    lie = {"usage": '"usage":{"input_tokens":0}'}
    body = {**BODIES[path], "stream": stream, "metadata": lie, "tools": None}
    async with limited_door(tmp_path, limited("a", tokens_per_day=1_000_000)) as door:
        async with door.session.post(door.url + path, json=body, headers=headers("a")) as answer:
            assert answer.status == 200
            await answer.read()
        assert used(door, "tokens_per_day") == 4 + 3 + 1  # 0.1, rounded up


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_a_stream_of_another_api_that_breaks_off_is_charged_its_prompt_and_its_deltas(path: str, tmp_path: Path) -> None:
    body = {**BODIES[path], "max_tokens": 50, "max_output_tokens": 50, "stream": True, "fake": {"after": 4}}
    async with limited_door(tmp_path, limited("a", tokens_per_day=1_000_000)) as door:
        async with door.session.post(door.url + path, json=body, headers=headers("a")) as answer:
            text = await answer.text()
        deltas = text.count("_delta\n") + text.count(".delta\n")
        assert 0 < deltas < 50
        assert used(door, "tokens_per_day") == len(str(None)) + deltas  # the fake planner's size of a prompt that it has not


@pytest.mark.parametrize(("path", "field"), [("/v1/responses", "max_output_tokens"), ("/v1/messages", "max_tokens")])
async def test_what_a_key_bounds_holds_on_every_api(path: str, field: str, tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited("a", max_tokens_max=10)) as door:
        status, answer, _ = await door.post(path, {**BODIES[path], field: 11}, headers=headers("a"))
        assert (status, answer["error"]["param"]) == (400, field)


async def test_a_response_without_a_bound_gets_the_default_of_its_key(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited("a", tokens_per_day=1000), answer_tokens_default=7) as door:
        assert (await door.post("/v1/responses", {"input": "hello"}, headers=headers("a")))[0] == 200
        seen = await door.seen("replica-0")
        assert seen["requests"][0]["body"]["max_output_tokens"] == 7


async def test_what_only_counts_tokens_costs_none(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited("a", tokens_per_day=10)) as door:
        for _ in range(3):
            status, answer, _ = await door.post("/tokenize", {"prompt": "x" * 500}, headers=headers("a"))
            assert (status, answer["count"]) == (200, 500)
        assert used(door, "tokens_per_day") == 0


async def test_a_response_is_gone_on_from_where_it_is_kept_and_by_its_tenant_alone(tmp_path: Path) -> None:
    async with running_door(tmp_path, tenants=TENANTS) as door:
        await door.add_engine("replica-0")
        await door.add_engine("replica-1")
        _, first, _ = await door.post("/v1/responses", {"input": "one"}, headers=ACME)
        door.planner.fleet.replicas = dict(reversed(door.planner.fleet.replicas.items()))  # the other one would get it
        again = {"input": "two", "previous_response_id": first["id"]}
        status, second, heads = await door.post("/v1/responses", again, headers=ACME)
        assert (status, heads["x-peerkv-replica"]) == (200, "replica-0"), second
        status, answer, _ = await door.post("/v1/responses", again, headers=OTHER)
        assert (status, answer["error"]["code"]) == (404, "previous_response_not_found")
        status, answer, _ = await door.post("/v1/responses", {**again, "previous_response_id": "resp_x"}, headers=ACME)
        assert (status, answer["error"]["param"]) == (404, "previous_response_id")
        known = new_id(owner_of(door.tenants.named("acme")), "replica-0")  # type: ignore[arg-type]
        status, answer, _ = await door.post("/v1/responses", {**again, "previous_response_id": known}, headers=ACME)
        assert (status, answer["error"]["code"]) == (404, "previous_response_not_found")
        assert "VLLM_ENABLE_RESPONSES_API_STORE" in answer["error"]["message"]


async def test_a_response_in_the_background_is_refused(door: Door) -> None:
    status, answer, _ = await door.post("/v1/responses", {"input": "x", "background": True})
    assert (status, answer["error"]["param"]) == (400, "background")


@pytest.mark.parametrize("id", ["", "resp_", "resp_" + "é" * 64, "resp_" + "\ud800" * 64, "chatcmpl-1", "resp_" + "0" * 64])
def test_an_id_of_somebody_else_has_no_keeper(id: str) -> None:
    assert keeper(id, "salt", ["replica-0"]) is None
    assert keeper(new_id("salt", "replica-1"), "salt", ["replica-0", "replica-1"]) == "replica-1"
    assert keeper(new_id("salt", "replica-1"), "salt", ["replica-0"]) is None
    assert keeper(new_id("salt", "replica-1"), "other", ["replica-1"]) is None


def test_tenants_of_a_group_do_not_reach_each_others_responses() -> None:
    one, two = (owner_of(TenantContext(name, "the salt of both")) for name in ("one", "two"))
    assert keeper(new_id(one, "replica-0"), one, ["replica-0"]) == "replica-0"
    assert keeper(new_id(one, "replica-0"), two, ["replica-0"]) is None


@pytest.mark.parametrize("part", [{"type": "input_image", "uuid": "x"}, {"type": "image_embeds", "image_embeds": "AA"}])
@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/responses", "input"), ("/v1/messages", "messages"), ("/v1/messages", "system"), ("/rerank", "documents")],
)
async def test_parts_that_reach_into_the_engine_are_refused_wherever_they_are(
    path: str, field: str, part: dict[str, Any], door: Door
) -> None:
    for value in (
        [{"role": "user", "content": [part]}],
        [{"role": "user", "content": [{"type": "tool_result", "content": [part]}]}],
    ):
        status, answer, _ = await door.post(path, {**BODIES[path], field: value})
        assert (status, answer["error"]["code"]) == (400, "unsupported_parameter"), answer


def form(**fields: str) -> aiohttp.FormData:
    data = aiohttp.FormData()
    for name, value in fields.items():
        data.add_field(name, value)
    data.add_field("file", b"RIFF" + bytes(5000), filename='a "speech".wav', content_type="audio/wav")
    return data


async def test_audio_is_passed_on_as_a_form_written_anew(door: Door) -> None:
    data = form(model="fake-model", language="en")
    status, answer, _ = await door.post("/v1/audio/transcriptions", json=None, data=data)
    assert (status, answer["text"]) == (200, "w0 w1")
    seen = await door.seen("replica-0")
    assert seen["requests"][-1]["body"] == {"model": "fake-model", "language": "en", "file": 5004}


@pytest.mark.parametrize("field", ["vllm_xargs", "cache_salt", "unheard_of"])
async def test_a_form_takes_known_fields_alone(field: str, door: Door) -> None:
    status, answer, _ = await door.post("/v1/audio/translations", json=None, data=form(**{field: "x"}))
    assert (status, answer["error"]["param"]) == (400, field)


@pytest.mark.parametrize("raw", [b"", b"--x\r\n", b"--x\r\ncontent-disposition: form-data\r\n\r\n\r\n--x--", b"garbage"])
async def test_a_form_that_cannot_be_read_is_the_clients_error(raw: bytes, door: Door) -> None:
    heads = {"content-type": "multipart/form-data; boundary=x"}
    status, answer, _ = await door.post("/v1/audio/transcriptions", json=None, data=raw, headers=heads)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    status, answer, _ = await door.post("/v1/audio/transcriptions", {"file": "x"})
    assert (status, answer["error"]["code"]) == (400, "invalid_content_type")


async def test_tenants_are_not_let_share_a_cache_that_has_no_salt(tmp_path: Path) -> None:
    async with running_door(tmp_path, tenants=TENANTS) as door:
        await door.add_engine("replica-0")
        status, answer, _ = await door.post("/v1/audio/transcriptions", json=None, data=form(), headers=ACME)
        assert (status, answer["error"]["code"]) == (403, "unsupported_endpoint")
