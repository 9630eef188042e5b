"""What a client's body may hold, and what of it reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.body import FORBIDDEN_FIELDS
from tests.unit.gateway.relay.relay_client import CHAT, COMPLETION
from tests.unit.gateway.running_door import Door


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
