"""How many tokens a request may come to, and what is put into its body so that it comes to no more. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.api.endpoints import ENDPOINTS, Endpoint
from gateway.errors import InvalidRequest
from gateway.tenants.keys import KeyLimits

NUMBER_MAX = 1 << 31
"""Of what a request may ask for: far more than any model gives."""
COMPLETION_TOKENS = 16
"""vLLM's, as OpenAI's, for completions without `max_tokens`."""

_ONE_CHOICE = frozenset(("responses", "messages"))


class PromptSize(msgspec.Struct, frozen=True, gc=False):
    """`prompts` prompts of so many `tokens` each, by the engine's count; if not `certain`, a bound of all of them together."""

    tokens: int
    prompts: int
    certain: bool


class RequestSize(msgspec.Struct, frozen=True):
    """Tokens of all prompts and of all answers at most, and fields to put into the body."""

    prompt_tokens: int
    answer_tokens: int
    changes: dict[str, Any]


def size_of(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    limits: KeyLimits,
    prompt: PromptSize,
    *,
    context_tokens: int | None,
    answer_tokens_default: int,
) -> RequestSize:
    """The size of a request. Raises InvalidRequest if it wants more than its key may.

    Where nothing bounds tokens the body stays as it is. A chat without a bound on its answer may go on to the end of the
    context: it is given `answer_tokens_default`, or what is left of the context if that is less, as else its key could not have
    two under way.
    """
    traits = ENDPOINTS[endpoint]
    if traits.work == "counts":
        return RequestSize(0, 0, {})
    tokens, count, certain = prompt.tokens, prompt.prompts, prompt.certain
    prompts = tokens * count if certain else tokens
    if context_tokens is not None:
        prompts, tokens = min(prompts, context_tokens * count), min(tokens, context_tokens)
    if traits.work != "generates":
        return RequestSize(prompts, 0, {})
    choices = 1 if endpoint in _ONE_CHOICE else _number(body, "n", limits.n_max) or 1
    name = traits.bound
    if endpoint == "chat" and body.get(name) is None:
        name = "max_tokens"
    answer = _number(body, name, limits.max_tokens_max)
    changes: dict[str, Any] = {}
    if answer is None:
        answer = COMPLETION_TOKENS if endpoint == "completions" else answer_tokens_default
        if limits.max_tokens_max is not None:
            answer = min(answer, limits.max_tokens_max)
        if context_tokens is not None and endpoint != "completions":
            left = max(1, context_tokens - tokens)
            # A bound on the prompt says little of what is left: the engine would refuse an answer that does not fit.
            answer = min(answer, left) if certain else min(answer, max(left, context_tokens // 4))
        if limits.bounds_tokens:
            changes[traits.bound] = answer
    return RequestSize(prompts, answer * choices * count, changes)


def _number(body: Mapping[str, Any], name: str, most: int | None) -> int | None:
    """The number in a field, None if there is none. Raises InvalidRequest."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise InvalidRequest(f"'{name}' must be a whole number.", param=name, code="invalid_type")
    if value > NUMBER_MAX:
        raise InvalidRequest(f"'{name}' must be {NUMBER_MAX} or less.", param=name, code="invalid_value")
    if most is not None and value > most:
        raise InvalidRequest(f"'{name}' is {value}, and this API key allows {most}.", param=name, code="invalid_value")
    return value
