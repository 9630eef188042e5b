"""Which replicas' requests are overdue by so much that the replica is suspect. Pure.

A request alone shows little: the expectation may be wrong, or its queue long. But a core that has made no step either, for as
long, does not go on: it is frozen, or in a step that was not foreseen. In both cases others answer sooner.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

OVERDUE_FACTOR = 8.0
"""So many times its expectation a request may take. An unforeseen first compilation takes longer, and harms nobody when the
requests go elsewhere meanwhile."""


class Expected(Protocol):
    """A request under way: when it was decided on, in CLOCK_MONOTONIC seconds, and how soon its first token was expected."""

    @property
    def decided_at(self) -> float: ...
    @property
    def expected_seconds(self) -> float: ...


def overdue_seconds(waiting: Iterable[Expected], last_step_at: float, now: float, seconds_min: float) -> float:
    """For how long a replica gives no sign of life to those that wait for a first token there; 0 if that is no matter yet.

    `seconds_min` is what every request may take.
    """
    longest = 0.0
    for each in waiting:
        silent = now - max(each.decided_at, last_step_at)
        if silent > longest and silent > max(seconds_min, OVERDUE_FACTOR * each.expected_seconds):
            longest = silent
    return longest
