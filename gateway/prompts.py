"""The `prompt` of a completion request, in its four forms, as token ids or a 400. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from gateway.errors import InvalidRequest

TOKEN_ID_MAX = 2**31 - 1
# With one of these set the engine's answer depends on the text, or on more than the ids, so the prompt goes as it came.
_TEXT_FIELDS = ("echo", "suffix", "truncate_prompt_tokens", "truncation_side", "prompt_embeds", "return_token_offsets")
_TEXT_FIELDS_OF_IDS = ("suffix", "truncate_prompt_tokens", "prompt_embeds")


def split_prompts(prompt: object) -> list[str] | list[list[int]]:
    """Return the prompts of a request one by one: str, list[str], list[int] and list[list[int]] are taken.

    Raises InvalidRequest (400) for anything else, for an empty list, and for ids that are no int32 of at least 0.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _invalid("must be a string, or a list of strings or token ids that is not empty")
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return prompt
    if kinds == {int}:
        _check_ids(prompt)
        return [prompt]
    if kinds != {list}:
        raise _invalid("must hold strings, token ids, or lists of token ids, and only one of these")
    for ids in prompt:
        if set(map(type, ids)) != {int}:
            raise _invalid("holds a list that is empty or has something in it that is no token id")
        _check_ids(ids)
    return prompt


def _check_ids(ids: Sequence[int]) -> None:
    low, high = min(ids), max(ids)
    if low < 0 or high > TOKEN_ID_MAX:
        raise _invalid(f"holds {low if low < 0 else high}, which is no token id")


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"'prompt' {what}.", param="prompt", code="invalid_prompt")


def depends_on_text(body: Mapping[str, Any]) -> bool:
    """Tell whether a completion's text has to reach the engine as text."""
    return any(body.get(name) not in (None, False) for name in _TEXT_FIELDS)


def ids_are_the_prompt(body: Mapping[str, Any]) -> bool:
    """Tell whether the engine's prompt is what the prompt's ids say, neither cut nor extended."""
    return all(body.get(name) is None for name in _TEXT_FIELDS_OF_IDS)


def reads_no_cache(body: Mapping[str, Any]) -> bool:
    """Tell whether the engine computes the whole prompt whatever its cache holds: logprobs of the prompt are wanted."""
    if body.get("prompt_logprobs") is not None:
        return True
    return bool(body.get("echo")) and body.get("logprobs") not in (None, False)
