"""What tokens count for: uncached prompt tokens 1 each, the others their prices. Pure."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import msgspec

_DIGITS = 6  # beyond that a product of prices is no more than rounding


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one request, of all its prompts and choices."""

    uncached_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0


class Prices(NamedTuple):
    """Of one token each, in uncached prompt tokens."""

    cached_token: float
    generated_token: float

    def charge(self, usage: Usage) -> int:
        """What a request counts for, in whole tokens, rounded up."""
        priced = usage.cached_tokens * self.cached_token + usage.generated_tokens * self.generated_token
        whole = int(priced)
        return usage.uncached_tokens + (whole if whole == priced else ceil(round(priced, _DIGITS)))
