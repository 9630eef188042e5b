"""A replica's errors in OpenAI's words: vLLM's own have a type by its exception and the HTTP status as their code. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.errors import INVALID, error_body

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "internal_error",
    502: "upstream_error",
    503: "service_unavailable",
    504: "upstream_error",
}
_LENGTH_PARAMS = frozenset(("input_tokens", "input_text"))  # vLLM's names of a prompt that is too long
_ANSWER_PARAMS = frozenset(("max_tokens", "max_completion_tokens", "max_output_tokens"))
_CONTEXT = "max_model_len"
"""Named in vLLM's message where the answer alone exceeds the context. One that does so with its prompt is shortened instead."""
_RESPONSE_PARAM = "response_id"
_RESPONSE_HINT = (
    "Replicas keep responses until they end, if they were started with VLLM_ENABLE_RESPONSES_API_STORE=1. "
    "Else send the conversation so far as 'input'."
)
_EVENT = b"data: "
_EVENT_END = b"\n\n"
ERROR_EVENT = b'data: {"error"'
"""How an error event of vLLM begins, and nothing else: within a string the quotes would be escaped."""


def error_in_our_form(status: int, body: bytes) -> bytes:
    """The body of a replica's answer with an error status, in OpenAI's form with vLLM's message."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = None
    error = found.get("error") if isinstance(found, dict) else None
    if isinstance(error, dict):
        return _translated(status, error)
    detail = found.get("detail") if isinstance(found, dict) else None
    message = detail if isinstance(detail, str) else f"The replica answered with status {status}."
    return error_body(message, type=_type(status))


def error_code(body: bytes) -> str:
    """The code of an error in OpenAI's form, that `body` begins with; its type if it has no code, "" if it is none."""
    try:
        error = msgspec.json.decode(body.partition(_EVENT_END)[0])["error"]
        found = error["code"] or error["type"]
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def events_in_our_form(chunk: bytes) -> bytes:
    """Whole events of a stream, those that are errors in OpenAI's form."""
    return _EVENT_END.join(_event(event) if event.startswith(ERROR_EVENT) else event for event in chunk.split(_EVENT_END))


def _event(event: bytes) -> bytes:
    try:
        error = msgspec.json.decode(event[len(_EVENT) :])["error"]
    except (msgspec.MsgspecError, UnicodeDecodeError):  # cut off, or no event of vLLM's after all
        return event
    if not isinstance(error, dict):
        return event
    code = error.get("code")
    return _EVENT + _translated(code if type(code) is int else 500, error)


def _translated(status: int, error: dict[str, Any]) -> bytes:
    message, code, param = error.get("message"), error.get("code"), error.get("param")
    param = param.removeprefix("body.") if isinstance(param, str) and param != "body" else None
    words = code if isinstance(code, str) else None
    text = message if isinstance(message, str) else f"The replica answered with status {status}."
    if param in _LENGTH_PARAMS:
        words, param = words or "context_length_exceeded", None
    elif param in _ANSWER_PARAMS and _CONTEXT in text:
        words = words or "context_length_exceeded"
    elif status == 404 and words is None:
        words = "model_not_found" if param == "model" else "not_found"
    if param == _RESPONSE_PARAM:
        words, param, text = "previous_response_not_found", "previous_response_id", f"{text} {_RESPONSE_HINT}"
    return error_body(text, type=_type(status), code=words, param=param)


def _type(status: int) -> str:
    return _TYPES.get(status, INVALID if status < 500 else "internal_error")
