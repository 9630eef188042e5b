"""Errors in the form that an endpoint's clients know: OpenAI's, that of its Responses' streams, or Anthropic's. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.api.endpoints import Dialect
from gateway.errors import ApiError

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_answer(dialect: Dialect, status: int, body: bytes) -> bytes:
    """The body of an answer with an error, from `body`, an error in OpenAI's form."""
    return _anthropic(status, body) if dialect == "anthropic" else body


def error_event(dialect: Dialect, error: ApiError) -> bytes:
    """The event by which a stream ends with an error."""
    body = error.body()
    if dialect == "anthropic":
        return b"event: error\ndata: %b\n\n" % _anthropic(error.status, body)
    if dialect == "responses":
        # Clients look for the type, as OpenAI sends it, or for an error as all other streams have it.
        found = _error(body)
        told = {name: found[name] for name in ("code", "message", "param")}
        event = {"type": "error", **told, "sequence_number": 0, "error": found}
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(event)
    return b"data: %b\n\n" % body


def _error(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(body)["error"]
    return found


def _anthropic(status: int, body: bytes) -> bytes:
    """Anthropic's type follows from the status; our code, which its form has no place for, stays readable beside it."""
    error = _error(body)
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    told = {"type": kind, "message": error["message"], "code": error.get("code"), "param": error.get("param")}
    return msgspec.json.encode({"type": "error", "error": told})
