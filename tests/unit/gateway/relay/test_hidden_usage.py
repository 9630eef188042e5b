"""The usage event that a client did not ask for, and what vLLM says in it beside the usage."""

from __future__ import annotations

import json

import pytest

from gateway.relay.hidden_usage import UsageHider

TOKEN = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
END = b'data: {"choices":[{"text":"b","finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
STAMPED = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":5},"system_fingerprint":"vllm-\\u00e9"}\n\n'
DONE = b"data: [DONE]\n\n"


def shown(*chunks: bytes) -> bytes:
    hider = UsageHider()
    return b"".join(map(hider.take, chunks)) + hider.end()


def test_the_event_with_the_usage_alone_is_left_out() -> None:
    assert shown(TOKEN + USAGE + DONE) == TOKEN + DONE
    assert shown(USAGE) == b""
    assert shown(TOKEN, END, USAGE, DONE) == TOKEN + END + DONE


@pytest.mark.parametrize("chunks", [(TOKEN + END + END + STAMPED + DONE,), (TOKEN, END, TOKEN, END, STAMPED, DONE)])
def test_the_fingerprint_comes_where_it_would_have_been_without_the_usage(chunks: tuple[bytes, ...]) -> None:
    events = shown(*chunks).split(b"\n\n")[:-1]
    assert events[-1] == DONE.strip()
    told = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
    ends = [event for event in told if event["choices"][0]["finish_reason"]]
    assert len(ends) == 2
    assert all(event["system_fingerprint"] == "vllm-é" for event in ends)
    assert not any("system_fingerprint" in event for event in told if event not in ends)
    assert len(told) == b"".join(chunks).count(b"text")


def test_an_end_that_has_a_fingerprint_keeps_its_own() -> None:
    own = END.replace(b'"choices"', b'"system_fingerprint":"own","choices"')
    assert shown(own, STAMPED, DONE) == own + DONE


@pytest.mark.parametrize(
    "chunk",
    [
        TOKEN + DONE,
        TOKEN + END,
        TOKEN + END + DONE,
        b': "usage"\n\n',
        b'data: {"choices":[{"text":"\\"usage\\": {}"}]}\n\n',
        b'data: {"choices":[{"text":"\\"finish_reason\\": \\"x\\""}]}\n\n',
        b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":5}}\n\n',
        b'data: {"choices":[],"usage":null}\n\n',
        b'data: {"error":{"message":"x"},"usage":{}}\n\n',
        b'data: {"choices":[],"usage":5}\n\n',
        b'data: {"usage": cut',
    ],
)
def test_everything_else_passes_byte_for_byte(chunk: bytes) -> None:
    assert shown(chunk) == chunk
