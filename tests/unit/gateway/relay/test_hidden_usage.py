"""The usage event that a client did not ask for."""

from __future__ import annotations

import pytest

from gateway.relay.hidden_usage import without_usage

TOKEN = b'data: {"choices":[{"text":"a"}]}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_the_event_with_the_usage_alone_is_left_out() -> None:
    assert without_usage(TOKEN + USAGE + DONE) == TOKEN + DONE
    assert without_usage(USAGE) == b""


@pytest.mark.parametrize(
    "chunk",
    [
        TOKEN + DONE,
        b': "usage"\n\n',
        b'data: {"choices":[{"text":"\\"usage\\": {}"}]}\n\n',
        b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":5}}\n\n',
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"error":{"message":"x"},"usage":{}}\n\n',
        b'data: {"choices":[],"usage":5}\n\n',
        b'data: {"usage": cut',
    ],
)
def test_everything_else_passes_byte_for_byte(chunk: bytes) -> None:
    assert without_usage(chunk) == chunk
