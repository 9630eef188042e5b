"""Which streams another engine can go on with, so that the client gets the tokens of an undisturbed one.

Greedy ones alone: what is sampled would be sampled anew. Whatever looks back at the output in a way that the prompt cannot
stand for is left out, and so is every field that is not known to be harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import msgspec

from gateway.api.endpoints import Endpoint

TokensDefault = Callable[[], int | Literal[False] | None]
"""Tells what the model's own configuration bounds answers by, None for nothing; False if that is not known."""
TOKENS_DEFAULT = 16
"""vLLM's bound for completions that name none."""
_HARMLESS = frozenset(
    (
        *("model", "prompt", "messages", "stream", "stream_options", "stream_interval", "user", "prompt_cache_key"),
        *("max_tokens", "max_completion_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "add_special_tokens"),
        # Of the prompt and the output alike, or of each token alone:
        *("repetition_penalty", "logit_bias", "allowed_token_ids", "return_token_ids"),
        # How a chat becomes a prompt, of which the ids are kept:
        *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"),
        *("metadata", "store", "service_tier", "safety_identifier", "prompt_cache_retention", "verbosity"),
        *("include_reasoning", "parallel_tool_calls", "functions", "function_call"),
    )
)
_NEUTRAL: Mapping[str, Collection[object]] = {
    "n": (1,),
    "use_beam_search": (False,),
    "echo": (False,),
    "logprobs": (False,),  # of a chat; for a completion 0 asks for some
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "watermarking": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "bad_words": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "suffix": ("",),
    "length_penalty": (1,),
}
"""Fields that do nothing with one of these values."""


class Terms(msgspec.Struct, frozen=True):
    """How a stream is to be continued.

    `max_tokens` is what the whole answer may have, None if the context alone bounds it. `lookback` characters before the end
    of the text may be the beginning of a stop string, `held` of them the engine keeps back. `wants_ids` and `wants_usage`
    are what the client, or we, asked for of tokens' ids and of the usage at the end. `parsed`: the engine parses the text of
    this chat.
    """

    chat: bool = False
    max_tokens: int | None = None
    min_tokens: int = 0
    lookback: int = 0
    held: int = 0
    wants_ids: bool = False
    wants_usage: bool = False
    parsed: bool = False


def terms_of(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    bounds: Mapping[str, Any],
    tokens_default: TokensDefault = lambda: None,
    *,
    parses: bool = False,
) -> Terms | None:
    """Return the terms for a streamed request whose fields are all in `body`; None if it cannot be continued exactly.

    `bounds` are fields that are put into the body; `tokens_default` tells what bounds answers for which nobody names a bound.
    `parses`: the engines parse the text of chats.
    """
    temperature = body.get("temperature")
    if type(temperature) not in (int, float) or temperature != 0 or endpoint not in ("completions", "chat"):
        return None
    parsed = endpoint == "chat" and (parses or bool(body.get("tools")))
    if not all(
        value is None or name in _HARMLESS or (parsed and name == "tools") or _is_neutral(name, value)
        for name, value in body.items()
    ):
        return None
    if endpoint == "completions" and body.get("logprobs") is not None:
        return None
    if parsed and body.get("return_token_ids"):  # which come with events of which the client may have a part
        return None
    tokens = _tokens_max(endpoint, {**body, **bounds}, tokens_default)
    least, stops = body.get("min_tokens") or 0, _stops(body.get("stop"))
    if tokens is False or type(least) is not int or stops is None:
        return None
    lookback = max(map(len, stops), default=1) - 1
    options = bounds.get("stream_options") or body.get("stream_options")
    return Terms(
        chat=endpoint == "chat",
        max_tokens=tokens,
        min_tokens=least,
        lookback=lookback,
        held=0 if body.get("include_stop_str_in_output") else lookback,
        wants_ids=body.get("return_token_ids") is True,
        wants_usage=isinstance(options, dict) and options.get("include_usage") is True,
        parsed=parsed,
    )


def _is_neutral(name: str, value: object) -> bool:
    return any(value == each and type(value) in (type(each), int, float) for each in _NEUTRAL.get(name, ()))


def _tokens_max(endpoint: Endpoint, body: Mapping[str, Any], default: TokensDefault) -> int | Literal[False] | None:
    """What bounds the answer, as vLLM sees it; False if that is no number above 0."""
    given = body.get("max_tokens", TOKENS_DEFAULT if endpoint == "completions" else None)
    if endpoint == "chat" and body.get("max_completion_tokens") is not None:
        given = body["max_completion_tokens"]
    if given is None:
        return default()
    return given if type(given) is int and given > 0 else False


def _stops(given: object) -> list[str] | None:
    """The stop strings; None if they are malformed."""
    if given is None:
        return []
    listed = [given] if isinstance(given, str) else given
    return listed if isinstance(listed, list) and all(isinstance(stop, str) for stop in listed) else None
