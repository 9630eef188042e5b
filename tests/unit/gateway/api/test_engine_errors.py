"""What vLLM says of an error, in OpenAI's form."""

import json
from typing import Any

import pytest

from gateway.api.engine_errors import error_in_our_form, events_in_our_form


def theirs(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()


@pytest.mark.parametrize(
    ("status", "kind", "param", "expected"),
    [
        (400, "BadRequestError", None, ("invalid_request_error", None, None)),
        (400, "Bad Request", "body.max_tokens", ("invalid_request_error", "max_tokens", None)),
        (400, "BadRequestError", "input_tokens", ("invalid_request_error", None, "context_length_exceeded")),
        (404, "NotFoundError", "model", ("invalid_request_error", "model", "model_not_found")),
        (422, "UnprocessableEntityError", None, ("invalid_request_error", None, None)),
        (429, "Too Many Requests", None, ("rate_limit_error", None, None)),
        (500, "InternalServerError", None, ("internal_error", None, None)),
        (501, "NotImplementedError", None, ("internal_error", None, None)),
        (503, "ServiceUnavailableError", None, ("service_unavailable", None, None)),
    ],
)
def test_an_error_keeps_its_message_and_gets_a_type_and_a_word(
    status: int, kind: str, param: str | None, expected: tuple[str, str | None, str | None]
) -> None:
    error = json.loads(error_in_our_form(status, theirs("why: “so”", kind, status, param)))["error"]
    assert error.pop("message") == "why: “so”"
    assert (error["type"], error["param"], error["code"]) == expected
    assert error.keys() == {"type", "param", "code"}


@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_an_answer_that_the_context_cannot_hold_is_told_from_other_wrong_lengths(param: str) -> None:
    too_long = f"{param}=9000 cannot be greater than max_model_len=8192. Please request fewer output tokens."
    for message, code in ((too_long, "context_length_exceeded"), (f"{param} must be at least 1, got 0.", None)):
        error = json.loads(error_in_our_form(400, theirs(message, "BadRequestError", 400, param)))["error"]
        assert (error["message"], error["param"], error["code"]) == (message, param, code)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"detail": "Method Not Allowed"}', "Method Not Allowed"),
        (b"Internal Server Error", "The replica answered with status 500."),
        (b'{"error": "text"}', "The replica answered with status 500."),
        (b'{"error": {"message": 5}}', "The replica answered with status 500."),
        (b"[]", "The replica answered with status 500."),
        (b"\xff", "The replica answered with status 500."),
        (b"", "The replica answered with status 500."),
    ],
)
def test_whatever_is_no_error_of_vllm_becomes_one_of_openai(body: bytes, message: str) -> None:
    error = json.loads(error_in_our_form(500, body))["error"]
    assert error == {"message": message, "type": "internal_error", "param": None, "code": None}


@pytest.mark.parametrize("event", ['data: {"error"', 'data: {"error": 5}', 'data: {"error": {}', "data: {}", ": x", ""])
def test_events_that_are_no_errors_stay_as_they_are(event: str) -> None:
    chunk = b"data: 1\n\n" + event.encode() + b"\n\ndata: 2\n\n"
    assert events_in_our_form(chunk) == chunk


def test_an_error_between_other_events_is_put_into_our_form() -> None:
    chunk = b'data: {"a": 1}\n\ndata: ' + theirs("no", "BadRequestError", 400) + b"\n\ndata: [DONE]\n\n"
    events = events_in_our_form(chunk).split(b"\n\n")
    found: Any = json.loads(events[1].removeprefix(b"data: "))
    assert found == {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
    assert [events[0], *events[2:]] == [b'data: {"a": 1}', b"data: [DONE]", b""]
