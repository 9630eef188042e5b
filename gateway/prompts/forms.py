"""The `prompt` of a completion request, in its four forms, as token ids or a 400. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gateway.errors import InvalidRequest
from gateway.token_ids import TokenIds

_MIXED = "must hold strings, token ids, or lists of token ids, and only one of these"
# With one of these set the engine's answer depends on the text, or on more than the ids, so the prompt goes as it came.
_TEXT_FIELDS = frozenset(
    ("echo", "suffix", "truncate_prompt_tokens", "truncation_side", "prompt_embeds", "return_token_offsets")
)
_TEXT_FIELDS_OF_IDS = frozenset(("suffix", "truncate_prompt_tokens", "prompt_embeds"))

_LOOKED_AT = _TEXT_FIELDS | _TEXT_FIELDS_OF_IDS | {"add_special_tokens", "prompt_logprobs"}


def is_plain(body: Mapping[str, Any]) -> bool:
    """Tell at a glance that nothing in a completion's body but its prompt is looked at here."""
    return _LOOKED_AT.isdisjoint(body)


def split_prompts(prompt: object) -> list[str] | list[TokenIds]:
    """Return the prompts of a request one by one: str, list[str], list[int] and list[list[int]] are taken.

    Raises InvalidRequest (400) for anything else, for an empty list, and for ids that are not non-negative int32.
    """
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise _invalid("must be a string, or a list of strings or token ids that is not empty")
    first = type(prompt[0])
    if first is int:
        return [_token_ids(prompt, _MIXED)]
    kinds = set(map(type, prompt))
    if kinds == {str}:
        return prompt
    if kinds != {list}:
        raise _invalid(_MIXED)
    return [_token_ids(ids, "holds a list that is empty or contains something that is not a token id") for ids in prompt]


def _token_ids(given: Sequence[Any], otherwise: str) -> TokenIds:
    """Return a list out of JSON as token ids. 128k ids take 2 ms, half of what a look at each of them would take."""
    if not given:
        raise _invalid(otherwise)
    try:
        ids = TokenIds.of(given)
    except TypeError:
        raise _invalid(otherwise) from None
    except OverflowError:
        raise _invalid("holds a number that is not a token id") from None
    numbers = ids.numpy()
    if numbers.min() < 0:
        raise _invalid(f"holds {numbers.min()}, which is not a token id")
    if any(type(given[place]) is not int for place in np.flatnonzero(numbers <= 1)):  # true and false pass for 1 and 0
        raise _invalid(otherwise)
    return ids


def _invalid(what: str) -> InvalidRequest:
    return InvalidRequest(f"'prompt' {what}.", param="prompt", code="invalid_prompt")


def depends_on_text(body: Mapping[str, Any]) -> bool:
    """Tell whether a completion's text has to reach the engine as text."""
    return not _TEXT_FIELDS.isdisjoint(body) and any(body[name] not in (None, False) for name in _TEXT_FIELDS & body.keys())


def ids_are_the_prompt(body: Mapping[str, Any]) -> bool:
    """Tell whether the engine's prompt is what the prompt's ids say, neither cut nor extended."""
    return _TEXT_FIELDS_OF_IDS.isdisjoint(body) or all(body[name] is None for name in _TEXT_FIELDS_OF_IDS & body.keys())


def reads_no_cache(body: Mapping[str, Any]) -> bool:
    """Tell whether the engine computes the whole prompt whatever its cache holds: logprobs of the prompt are wanted."""
    if body.get("prompt_logprobs") is not None:
        return True
    return bool(body.get("echo")) and body.get("logprobs") not in (None, False)
