"""Which prompt lengths fit a model's context and the time there is."""

from collections.abc import Sequence

LADDER = (250, 500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
LENGTHS = 3
ROOM_TOKENS = 128
"""Left free in the context: the answer, and words that take more tokens than they were thought to."""
GROWTH = 1.6
"""A long prompt's seconds a token over a short one's, with the hits that are measured beside it."""


def choose_lengths(context_tokens: int, seconds_per_token: float, samples: int, seconds_max: float) -> Sequence[int]:
    """Up to LENGTHS neighbouring lengths, the longest that fit `context_tokens` and together `seconds_max`.

    `seconds_per_token` is what a short prompt takes to compute, `samples` how often each length is computed. There is always
    one length, however long it takes.
    """
    fitting = [length for length in LADDER if length <= context_tokens - ROOM_TOKENS] or [max(1, context_tokens // 2)]
    for last in range(len(fitting), 1, -1):
        chosen = fitting[max(0, last - LENGTHS) : last]
        if sum(chosen) * seconds_per_token * samples * GROWTH <= seconds_max:
            return chosen
    return fitting[:1]
