"""What a request may come to at most, and what its key does not allow."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import InvalidRequest
from gateway.limits.prices import Prices, Usage
from gateway.limits.request_size import PromptSize, RequestSize, size_of
from tests.unit.gateway.limits.limited_keys import limited

PROMPT = PromptSize(100, 1, certain=True)


def size(endpoint: Any, body: dict[str, Any], prompt: PromptSize = PROMPT, **limits: int) -> RequestSize:
    key = limited(**{"tokens_per_minute": 1000, **limits})
    return size_of(endpoint, body, key, prompt, context_tokens=2048, answer_tokens_default=512)


def test_what_is_asked_for_is_reserved_for_each_choice_and_prompt() -> None:
    assert size("completions", {"max_tokens": 7, "n": 3}, PromptSize(10, 2, certain=True)) == RequestSize(20, 42, {})
    assert size("chat", {"max_tokens": 9, "max_completion_tokens": 7}) == RequestSize(100, 7, {})
    assert size("embeddings", {"n": 5}) == RequestSize(100, 0, {})


def test_a_request_without_max_tokens_is_given_one() -> None:
    assert size("chat", {}) == RequestSize(100, 512, {"max_completion_tokens": 512})
    assert size("completions", {"max_tokens": None}) == RequestSize(100, 16, {"max_tokens": 16})
    assert size("chat", {}, max_tokens_max=50) == RequestSize(100, 50, {"max_completion_tokens": 50})
    assert size("completions", {}, max_tokens_max=5) == RequestSize(100, 5, {"max_tokens": 5})


def test_a_key_without_limits_on_tokens_leaves_the_body_as_it_is() -> None:
    size = size_of("chat", {}, limited(n_max=1), PROMPT, context_tokens=2048, answer_tokens_default=512)
    assert size.changes == {}


def test_an_answer_that_is_bounded_by_us_fits_into_the_context() -> None:
    assert size("chat", {}, PromptSize(2000, 1, certain=True)).changes == {"max_completion_tokens": 48}
    assert size("chat", {}, PromptSize(2048, 1, certain=True)).changes == {"max_completion_tokens": 1}


def test_a_prompt_of_unknown_length_is_no_longer_than_the_context() -> None:
    assert size("chat", {}, PromptSize(10**6, 1, certain=False)) == RequestSize(2048, 512, {"max_completion_tokens": 512})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 3}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 11}, "max_tokens"),
        ({"max_tokens": 10.0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 11, "max_tokens": 1}, "max_completion_tokens"),
    ],
)
def test_more_than_the_key_allows_is_refused_by_the_fields_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        size("chat", body, n_max=2, max_tokens_max=10)
    assert refused.value.param == param


def test_tokens_are_weighed_with_their_prices_and_rounded_up() -> None:
    prices = Prices(cached_token=0.1, generated_token=2.0)
    assert prices.charge(Usage(10, 30, 5)) == 23
    assert prices.charge(Usage(0, 1, 0)) == 1
    assert prices.charge(Usage()) == 0


def test_a_bound_of_several_prompts_is_of_all_of_them() -> None:
    assert size("completions", {"max_tokens": 7}, PromptSize(500, 100, certain=False)) == RequestSize(500, 700, {})
    assert size("embeddings", {}, PromptSize(10**6, 100, certain=False)) == RequestSize(204_800, 0, {})


@pytest.mark.parametrize("name", ["n", "max_tokens"])
def test_a_number_that_no_model_reaches_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        size("completions", {name: 10**400})
