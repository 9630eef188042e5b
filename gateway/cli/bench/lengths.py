"""Which prompt lengths fit into a model's context and the available time."""

from collections.abc import Sequence

LADDER = (250, 500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)
LENGTHS = 3
ROOM_TOKENS = 128
"""Kept free in the context: for the answer, and for words that take more tokens than estimated."""
GROWTH = 1.6
"""Ratio of seconds per token of a long prompt to a short one's, including the hits measured along with it."""


def choose_lengths(context_tokens: int, seconds_per_token: float, samples: int, seconds_max: float) -> Sequence[int]:
    """Return up to LENGTHS neighbouring lengths: the longest that fit into `context_tokens` and together into `seconds_max`.

    `seconds_per_token` is measured on a short prompt, `samples` is how often each length is computed. There is always at least
    one length, however long it takes.
    """
    fitting = [length for length in LADDER if length <= context_tokens - ROOM_TOKENS] or [max(1, context_tokens // 2)]
    for last in range(len(fitting), 1, -1):
        chosen = fitting[max(0, last - LENGTHS) : last]
        if sum(chosen) * seconds_per_token * samples * GROWTH <= seconds_max:
            return chosen
    return fitting[:1]
