"""The token counts that an answer ends with, found without decoding the answer. Pure."""

from __future__ import annotations

import re

import msgspec

from gateway.api.endpoints import ENDPOINTS, Endpoint

TAIL_BYTES_MAX = 1 << 20
"""The counts are looked for in so many bytes at an answer's end: log-probabilities of the prompt may follow them."""
# Within a string the quotes would be escaped, so this is a field and not what a model said.
_USAGE = b'"usage":'
_PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_COMPLETION = re.compile(rb'"completion_tokens": ?(\d+)')


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of all prompts of a request, and of all its choices; of the prompts' those that the engine had cached."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Counts(msgspec.Struct):
    """As the Responses and the Messages API have them; of the latter, `input_tokens` are those that no cache has to do with."""

    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: _Counts | None = None


class _Event(msgspec.Struct):
    usage: _Counts | None = None
    response: _Answer | None = None


_decode = msgspec.json.Decoder(_Event).decode
_DATA = b"data: "


def usage_of(answer: bytes, endpoint: Endpoint = "completions") -> Usage | None:
    """The last counts in a whole answer, or in the last events of a stream; None if it has none."""
    if ENDPOINTS[endpoint].dialect != "openai":
        return _usage_in_events(answer)
    start = answer.rfind(_USAGE, max(0, len(answer) - TAIL_BYTES_MAX))
    if start < 0:
        return None
    prompt, completion = _PROMPT.search(answer, start), _COMPLETION.search(answer, start)
    if prompt is None:
        return None
    cached, tokens = _CACHED.search(answer, start), int(prompt[1])
    return Usage(
        tokens,
        int(completion[1]) if completion is not None else 0,
        min(tokens, int(cached[1])) if cached is not None else 0,
    )


def _usage_in_events(answer: bytes) -> Usage | None:
    """As `usage_of`. These answers repeat what a client sent, which may have any name in it: so they are decoded."""
    for line in reversed(answer.split(b"\n")):
        if line.startswith((_DATA, b"{")) and _USAGE in line:
            try:
                found = _decode(line.removeprefix(_DATA))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue  # the rest of an event that began before
            counts = found.usage or (found.response.usage if found.response is not None else None)
            if counts is not None:
                return _as_usage(counts)
    return None


def _as_usage(counts: _Counts) -> Usage:
    cached = counts.cache_read_input_tokens or 0
    tokens = counts.input_tokens + cached + (counts.cache_creation_input_tokens or 0)
    if counts.input_tokens_details is not None:
        cached = counts.input_tokens_details.cached_tokens
    return Usage(tokens, counts.output_tokens, min(tokens, cached))
