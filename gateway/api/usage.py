"""The token counts that an answer ends with, found without decoding the answer. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

TAIL_BYTES_MAX = 1 << 20
"""The counts are looked for in so many bytes at an answer's end: log-probabilities of the prompt may follow them."""
# Within a string the quotes would be escaped, so this is a field and not what a model said.
_USAGE = b'"usage":'
_PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_COMPLETION = re.compile(rb'"completion_tokens": ?(\d+)')


class Usage(NamedTuple):
    """Tokens of all prompts of a request, and of all its choices; of the prompts' those that the engine had cached."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


def usage_of(answer: bytes) -> Usage | None:
    """The last counts in a whole answer, or in the last events of a stream; None if it has none."""
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
