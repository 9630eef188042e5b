"""Spans of time as they are typed: 30m, 12h, 90d."""

from __future__ import annotations

import re
from datetime import timedelta

SPANS = "such as 30m, 12h or 90d"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SPAN = re.compile(r"([0-9]+)([smhd])")


def span_of(text: str) -> timedelta | None:
    """The span that `text` names; None if it names none."""
    found = _SPAN.fullmatch(text)
    try:
        return None if found is None else timedelta(seconds=int(found[1]) * _SECONDS[found[2]])
    except OverflowError:
        return None
