"""The counts of tokens at an answer's end."""

import json

import pytest

from gateway.api.usage import TAIL_BYTES_MAX, Usage, usage_of

USAGE = {"prompt_tokens": 7, "total_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_the_counts_are_found_in_whatever_order_they_come(separators: tuple[str, str]) -> None:
    answer = json.dumps({"choices": [], "usage": USAGE, "prompt_logprobs": None}, separators=separators)
    assert usage_of(answer.encode()) == Usage(7, 3, 4)


def test_what_a_model_says_of_usage_is_not_taken_for_it() -> None:
    said = json.dumps({"choices": [{"text": '"usage":{"prompt_tokens":1,"completion_tokens":1}'}]})
    assert usage_of(said.encode()) is None


def test_of_several_counts_the_last_ones_hold() -> None:
    events = b"".join(b'data: {"usage":{"prompt_tokens":7,"completion_tokens":%d}}\n\n' % count for count in (1, 2, 3))
    assert usage_of(events + b"data: [DONE]\n\n") == Usage(7, 3)


def test_an_embedding_generates_nothing() -> None:
    assert usage_of(b'{"usage":{"prompt_tokens":7,"total_tokens":7}}') == Usage(7, 0)


@pytest.mark.parametrize("answer", [b"", b'{"choices":[]}', b'{"usage":null}', b'{"usage":{}}'])
def test_an_answer_without_counts_has_none(answer: bytes) -> None:
    assert usage_of(answer) is None


def test_counts_far_from_the_end_are_not_looked_for() -> None:
    counts = b'"usage":{"prompt_tokens":7,"completion_tokens":3}'
    assert usage_of(counts + b" " * (TAIL_BYTES_MAX - len(counts))) == Usage(7, 3)
    assert usage_of(counts + b" " * TAIL_BYTES_MAX) is None
