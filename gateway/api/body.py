"""A request's body: from bytes to a checked dict, and back. Pure.

Only what the gateway itself uses or must refuse is looked at; every other field is vLLM's to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.api.encodings import decode_half_pairs, is_whole
from gateway.api.endpoints import Endpoint
from gateway.errors import InvalidJson, InvalidRequest, UnsupportedParameter

# Fields of vLLM's request models (0.32 and 0.33) that reach past a request: into the KV transfer, another
# tenant's cache, the scheduler's order, other requests' ids, or code that is loaded by name; and those that only
# the parts of a serving system send to each other. tests/unit/gateway/api/test_body.py compares with the installed vLLM.
FORBIDDEN_FIELDS: Mapping[str, str] = {
    "kv_transfer_params": "the gateway decides where KV comes from",
    "ec_transfer_params": "the gateway decides where encoder outputs come from",
    "cache_salt": "the salt follows from the API key",
    "vllm_xargs": "it would reach the engine's internals",
    "prompt_embeds": "embeddings as a prompt are not supported",
    "session_id": "it would name a session across requests, perhaps another tenant's",
    "media_io_kwargs": "it would reach the loaders of media, and may name one",
    "mm_payload": "it is for a router of its own, and the gateway is one",
    "return_mm_kwargs": "it is for a router of its own, and the gateway is one",
    "routed_experts_prompt_start": "it is for a trainer beside the engine",
    "request_id": "send the header x-request-id instead",
    "priority": "it follows from the API key",
    "data_parallel_rank": "the gateway picks the replica",
    "logits_processors": "it would load code by name",
    "background": "an answer that is made without a client is not supported",
    "data": "what the engine's plugins make of it is not known here",
}
# With such a value a forbidden field says nothing: it is vLLM's default, and clients send all that they know.
_SAYS_NOTHING: Mapping[str, object] = {
    "priority": 0,
    "routed_experts_prompt_start": 0,
    "return_mm_kwargs": False,
    "mm_payload": "tensors",
    "background": False,
}
_TOKENISED = ("prompt", "messages", "input", "system", "instructions")
_SCORED = ("query", "documents", "queries", "items", "text_1", "text_2", "data_1", "data_2")
"""Fields of a score's or a rerank's texts, or messages' contents."""
_WITH_PARTS = ("input", "system", "previous_input_messages", *_SCORED)

_FORBIDDEN = frozenset(FORBIDDEN_FIELDS)
_PLAIN_PART = {"type", "text"}
_TENSORS = ("_embeds", "image_pil")
"""How vLLM's names of such parts end: prompt_embeds, image_embeds, audio_embeds, video_embeds; image_pil is a Python object."""
_decode = msgspec.json.Decoder().decode


def decode_body(raw: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in `raw`; of a key that occurs twice the last one counts. Raises InvalidJson."""
    try:
        body = _decode(raw)
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    except UnicodeDecodeError:
        body = _with_half_pairs(raw)
    except msgspec.MsgspecError as error:
        if not _is_half_pair(error):
            raise InvalidJson(f"The body is not JSON: {error}.") from None
        body = _with_half_pairs(raw)
    if not isinstance(body, dict):
        raise InvalidJson(f"The body must be a JSON object, not {_json_type(body)}.")
    return body


def check_body(endpoint: Endpoint, body: dict[str, Any]) -> bool:
    """Refuse what a client may not set, and wrong types of what the gateway reads; of the former vLLM's defaults are dropped.

    Returns whether the body is as it was. Raises UnsupportedParameter and InvalidRequest.
    """
    is_as_it_was = _FORBIDDEN.isdisjoint(body)
    if not is_as_it_was:
        _drop_forbidden(body)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong_type("model", "a string", model)
    if endpoint == "completions":
        prompt = body.get("prompt")
        if not isinstance(prompt, str | list):
            raise _wrong_type("prompt", "a string, or a list of strings or token ids", prompt)
    elif endpoint in ("chat", "messages", "count_tokens") or "messages" in body:
        _check_messages(body)
    if endpoint not in ("completions", "chat"):
        _check_other_fields(endpoint, body)
    return is_as_it_was


def _is_half_pair(error: msgspec.MsgspecError) -> bool:
    """Whether a string ended between the halves of a surrogate pair, or had the second one alone, perhaps as bytes."""
    text = str(error)
    return any(words in text for words in ("truncated", "surrogate", "hex escape", "Invalid UTF-8"))


def _with_half_pairs(raw: bytes | bytearray) -> Any:
    body = decode_half_pairs(raw)
    for name in _TOKENISED if isinstance(body, dict) else ():
        if not is_whole(body.get(name)):
            raise InvalidRequest(
                f"'{name}' holds half a surrogate pair, which has no tokens.", param=name, code="invalid_prompt"
            )
    return body


def _drop_forbidden(body: dict[str, Any]) -> None:
    for name in _FORBIDDEN.intersection(body):
        value = body[name]
        if value is not None and value != _SAYS_NOTHING.get(name):
            raise UnsupportedParameter(name, FORBIDDEN_FIELDS[name])
        del body[name]


def _check_messages(body: dict[str, Any]) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _wrong_type("messages", "a list of messages", messages)
    _check_all_parts(messages)


def _check_other_fields(endpoint: Endpoint, body: dict[str, Any]) -> None:
    for name in _WITH_PARTS:
        value = body.get(name)
        if isinstance(value, list | dict):
            _check_all_parts(value if isinstance(value, list) else [value], are_parts=True)
    if endpoint == "responses":
        _check_response(body)


def _check_response(body: dict[str, Any]) -> None:
    former = body.get("previous_response_id")
    if former is not None and not isinstance(former, str):
        raise _wrong_type("previous_response_id", "the id of a response", former)


def _check_all_parts(items: list[Any], *, are_parts: bool = False) -> None:
    try:
        _check_parts(items, are_parts=are_parts)
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None


def _check_parts(items: list[Any], *, are_parts: bool = False) -> None:
    """Refuse what reaches into the engine: tensors, and a `uuid`, which names a cached image, perhaps another tenant's.

    `items` are messages, or the parts of one's content, which may have parts in turn.
    """
    for item in items:
        if isinstance(item, list):  # a batch of conversations
            _check_parts(item, are_parts=are_parts)
        elif isinstance(item, dict):
            content = item.get("content")
            if are_parts and (item.get("type") != "text" or item.keys() != _PLAIN_PART):
                _check_part(item)
            if isinstance(content, list | dict):
                _check_parts(content if isinstance(content, list) else [content], are_parts=True)


def _check_part(part: dict[str, Any]) -> None:
    if part.get("uuid") is not None:
        raise UnsupportedParameter("uuid", "media are cached by their content")
    given = [name for name, value in part.items() if value is not None]
    kind = part.get("type")
    for name in (*given, kind) if isinstance(kind, str) else given:
        if name.endswith(_TENSORS):
            raise UnsupportedParameter(name, "it would put tensors or objects into the engine")


def _wrong_type(name: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"'{name}' must be {wanted}, not {_json_type(value)}.", param=name, code="invalid_type")


def _json_type(value: object) -> str:
    match value:
        case None:
            return "missing or null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list" if value else "an empty list"
        case _:
            return "an object"
