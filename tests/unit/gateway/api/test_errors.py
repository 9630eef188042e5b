"""The errors' JSON and headers."""

from __future__ import annotations

import json

import pytest

from gateway import errors


def leaves() -> list[errors.ApiError]:
    return [
        errors.InvalidRequest("m"),
        errors.InvalidJson("m"),
        errors.UnsupportedParameter("p"),
        errors.PromptTooLong(9, 8),
        errors.NotAuthenticated(),
        errors.Forbidden("m"),
        errors.UnknownPath("GET", "/x"),
        errors.UnknownModel("a", ["b"]),
        errors.NotOfThisModel("/v1/embeddings"),
        errors.MethodNotAllowed("GET", "/x", ["POST"]),
        errors.BodyTooLarge(1),
        errors.TooManyRequests(1),
        errors.Unavailable("m"),
        errors.NoReplicaReady(),
        errors.ReplicaNotReady("r", "starting"),
        errors.UnknownReplica("r", ["s"]),
        errors.ReplicaLost(),
        errors.ReplicaTooSlow(1.0),
        errors.InternalError("id"),
    ]


@pytest.mark.parametrize("error", leaves(), ids=lambda error: type(error).__name__)
def test_every_error_has_openais_four_fields(error: errors.ApiError) -> None:
    body = json.loads(error.body())
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert 400 <= error.status < 600


@pytest.mark.parametrize("error", leaves(), ids=lambda error: type(error).__name__)
def test_whoever_may_come_back_is_told_when(error: errors.ApiError) -> None:
    assert ("retry-after" in error.headers) == (error.status in (429, 502, 503))


def test_too_long_a_prompt_has_openais_code_and_both_lengths() -> None:
    error = errors.PromptTooLong(9000, 8192, param="messages")
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
    assert "8192" in error.message
    assert "9000" in error.message


def test_an_unknown_model_lists_what_is_served() -> None:
    assert "Served here: a, b." in errors.UnknownModel("c", ["a", "b"]).message
