"""Request bodies: whatever comes in, the answer is the client's error or a body that the engine may see."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gateway.api.body import FORBIDDEN_FIELDS, check_body, decode_body
from gateway.api.encodings import HALF_PAIRS_BYTES_MAX, as_utf8
from gateway.api.endpoints import ENDPOINTS
from gateway.api.fields import PASSED_FIELDS
from gateway.errors import ApiError, UnsupportedParameter
from gateway.relay.engine_body import engine_body
from gateway.relay.forms import FIELDS as FORM_FIELDS
from gateway.token_ids import TokenIds

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(
    [*sorted(FORBIDDEN_FIELDS), "prompt", "messages", "input", "system", "documents", "model", "content", "uuid", "n"]
)
ANY_ENDPOINT = st.sampled_from([*ENDPOINTS])


# The machine may be busy with engines, and the first text that is drawn builds tables.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def statuses(function: Callable[..., object], *arguments: object) -> tuple[int, object]:
    """200 and what the function returns, or the status of the ApiError that it raises; nothing else may be raised."""
    try:
        return 200, function(*arguments)
    except ApiError as error:
        return error.status, None


@PATIENT
@given(st.binary(max_size=200))
def test_any_bytes_are_a_body_or_the_clients_error(raw: bytes) -> None:
    status, body = statuses(decode_body, raw)
    assert status == (200 if isinstance(body, dict) else 400)


@PATIENT
@given(ANY_ENDPOINT, st.dictionaries(NAMES, JSON, max_size=5))
def test_any_object_passes_without_forbidden_fields_or_is_the_clients_error(endpoint: Any, body: dict[str, Any]) -> None:
    status, _ = statuses(check_body, endpoint, body)
    assert status == 400 or (status == 200 and not FORBIDDEN_FIELDS.keys() & body.keys())


@PATIENT
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=5))
def test_what_is_not_looked_at_comes_out_as_it_came_in(body: dict[str, Any]) -> None:
    # A lone surrogate has no bytes, and a huge integer no place in the encoder.
    status, parts = statuses(request_parts, body, None, {})
    assert status == 400 or (isinstance(parts, list) and decode_body(b"".join(parts)) == body)


def request_parts(body: dict[str, Any], raw: bytes | None, changes: dict[str, Any]) -> list[Any]:
    rest = {name: value for name, value in changes.items() if name != "prompt"}
    return engine_body(body, raw, changes.get("prompt")).parts(rest)


@PATIENT
@given(
    st.dictionaries(st.text(max_size=8) | st.just("prompt"), JSON, max_size=5),
    st.dictionaries(st.sampled_from(["cache_salt", "kv_transfer_params", "prompt"]), JSON, max_size=3),
    st.sampled_from(["", " ", "\r\n\t "]),
    st.booleans(),
)
def test_a_request_in_parts_is_the_body_with_its_changes(
    body: dict[str, Any], changes: dict[str, Any], space: str, untouched: bool
) -> None:
    changes = {name: value for name, value in changes.items() if value is not None}
    raw = (space + json.dumps(body) + space).encode()
    assume(statuses(decode_body, raw)[0] == 200)
    status, parts = statuses(request_parts, body, raw if untouched else None, changes)
    assume(status == 200)
    assert json.loads(b"".join(parts)) == {**body, **changes}


@pytest.mark.parametrize("body", [{}, {"n": 2}, {"prompt": "a text", "n": 2}])
@pytest.mark.parametrize("ids", [[], [7], [1, 2, 3]])
def test_token_ids_take_the_place_of_a_text(body: dict[str, Any], ids: list[int]) -> None:
    parts = request_parts(body, json.dumps(body).encode(), {"prompt": TokenIds.of(ids), "cache_salt": "s"})
    assert json.loads(b"".join(parts)) == {**body, "prompt": ids, "cache_salt": "s"}


@pytest.mark.parametrize(
    "ids", [TokenIds.of([]), TokenIds.of([7, 8]), TokenIds.joined([TokenIds.of([1, 2]), TokenIds.of([3])])]
)
@pytest.mark.parametrize("raw", [b'{"n":"\\u0000"}', None])
def test_token_ids_are_put_where_a_chats_are(ids: TokenIds, raw: bytes | None) -> None:
    changes = {
        "cache_salt": "\0",
        "kv_transfer_params": {"tag": 1, "ids": ids, "more": []},
        "z": {"ids": ids},
    }
    told = {"tag": 1, "ids": ids.tolist(), "more": []}
    found = json.loads(b"".join(request_parts({"n": "\0"}, raw, changes)))
    assert found == {"n": "\0", "cache_salt": "\0", "kv_transfer_params": told, "z": {"ids": ids.tolist()}}


def test_joined_ids_are_sent_part_by_part() -> None:
    known = TokenIds.of([1, 2])
    ids = TokenIds.joined([known, TokenIds.of([]), TokenIds.of([3])])
    parts = request_parts({"prompt": "x", "n": 1}, None, {"prompt": ids})
    assert b"".join(parts) == b'{"prompt":[1,2,3],"n":1}'
    assert any(part is known.text for part in parts)


def test_an_untouched_body_is_passed_on_as_it_came() -> None:
    raw = b' {"a" : 1.50, "a":"\\u0041}" }\n'
    assert b"".join(request_parts(decode_body(raw), raw, {})) == raw.rstrip()
    salted = b"".join(request_parts(decode_body(raw), raw, {"cache_salt": "s"}))
    assert salted == b' {"a" : 1.50, "a":"\\u0041}" ,"cache_salt":"s"}'


def test_of_a_key_that_occurs_twice_the_last_counts() -> None:
    assert decode_body(b'{"a": 1, "a": 2}') == {"a": 2}


def test_what_json_loads_takes_and_json_does_not_have_is_refused() -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        for rest in (b"", b', "b": "\\ud83d"'):
            assert statuses(decode_body, b'{"a": %b%b}' % (number, rest))[0] == 400


def test_half_a_surrogate_pair_is_taken_in_a_body_of_bounded_size() -> None:
    assert decode_body(b'{"a": "\\ud83d"}') == {"a": "\ud83d"}
    assert statuses(decode_body, b'{"a": "\\ud83d", "b": "%b"}' % (b"x" * HALF_PAIRS_BYTES_MAX))[0] == 400


@PATIENT
@given(
    st.dictionaries(st.text(max_size=8), JSON, min_size=1), st.sampled_from(["utf-8-sig", "utf-16", "utf-32-be", "utf-16-le"])
)
def test_other_encodings_of_a_body_say_the_same(body: dict[str, Any], encoding: str) -> None:
    text = json.dumps(body, ensure_ascii=False)
    assert decode_body(as_utf8(text.encode(encoding))) == decode_body(text.encode())


def test_every_conversation_of_a_batch_is_looked_at() -> None:
    part = {"type": "image_url", "uuid": "x"}
    with pytest.raises(UnsupportedParameter):
        check_body("embeddings", {"messages": [[{"role": "user", "content": [part]}]]})
    with pytest.raises(UnsupportedParameter):
        check_body("embeddings", {"input": [{"role": "user", "content": [part]}]})


# Kinds of content parts, to be weighed one by one as the fields are: texts, and media that the engine decodes by itself.
ALLOWED_PARTS = frozenset(
    [
        *("text", "thinking", "input_text", "output_text", "refusal", "tool_reference"),
        *("input_image", "image_url", "audio_url", "input_audio", "video_url"),
    ]
)
TENSOR_PARTS = ("prompt_embeds", "image_embeds", "audio_embeds", "video_embeds", "image_pil")


@pytest.mark.parametrize("kind", TENSOR_PARTS)
def test_a_part_that_puts_tensors_into_the_engine_is_refused(kind: str) -> None:
    parts: list[dict[str, Any]] = [
        {"type": kind, "data": "AAAA"},
        {"type": kind, "text": "x"},
        {kind: "AAAA"},
        {"type": "text", "text": "x", kind: "AAAA"},
    ]
    for part in parts:
        body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]}
        with pytest.raises(UnsupportedParameter, match=kind):
            check_body("chat", body)


@pytest.mark.parametrize("kind", sorted(ALLOWED_PARTS))
def test_texts_and_media_are_parts_that_a_client_may_send(kind: str) -> None:
    assert check_body("chat", {"messages": [{"role": "user", "content": [{"type": kind, "text": "x"}, "plain"]}]})


def test_every_kind_of_part_of_the_installed_vllm_was_weighed() -> None:
    pytest.importorskip("vllm")
    kinds = importlib.import_module("vllm.renderers.chat_utils").MM_PARSER_MAP.keys()
    assert kinds == ALLOWED_PARTS | set(TENSOR_PARTS)


@pytest.mark.parametrize(
    ("module", "models"),
    [
        ("openai.completion", ["CompletionRequest"]),
        ("openai.chat_completion", ["ChatCompletionRequest"]),
        ("pooling.embed", ["EmbeddingCompletionRequest", "EmbeddingChatRequest", "EmbeddingChatInputRequest"]),
        ("pooling.pooling", ["PoolingCompletionRequest", "PoolingChatRequest", "IOProcessorRequest"]),
        (
            "pooling.scoring",
            [
                "RerankRequest",
                "ScoreTextRequest",
                "ScoreDataRequest",
                "ScoreQueriesItemsRequest",
                "ScoreQueriesDocumentsRequest",
            ],
        ),
        ("openai.responses", ["ResponsesRequest"]),
        ("anthropic", ["AnthropicMessagesRequest", "AnthropicCountTokensRequest"]),
        ("serve.tokenize", ["TokenizeCompletionRequest", "TokenizeChatRequest", "DetokenizeRequest"]),
    ],
)
def test_every_field_of_the_installed_vllm_was_weighed(module: str, models: list[str]) -> None:
    pytest.importorskip("vllm")
    protocol = importlib.import_module(f"vllm.entrypoints.{module}.protocol")
    found = [getattr(protocol, name) for name in models if hasattr(protocol, name)]
    assert found
    for model in found:
        names = set(model.model_fields)
        aliases = {str(alias) for info in model.model_fields.values() for alias in (info.alias, info.validation_alias) if alias}
        assert names | aliases <= PASSED_FIELDS | FORBIDDEN_FIELDS.keys(), model


@pytest.mark.parametrize(
    ("module", "model"), [("transcription", "TranscriptionRequest"), ("translation", "TranslationRequest")]
)
def test_every_field_of_the_installed_vllms_forms_was_weighed(module: str, model: str) -> None:
    pytest.importorskip("vllm")
    found = getattr(importlib.import_module(f"vllm.entrypoints.speech_to_text.{module}.protocol"), model)
    names = {str(info.alias or name) for name, info in found.model_fields.items()}
    assert names <= FORM_FIELDS | FORBIDDEN_FIELDS.keys()


def test_no_field_is_both_allowed_and_forbidden() -> None:
    assert not PASSED_FIELDS & FORBIDDEN_FIELDS.keys()
