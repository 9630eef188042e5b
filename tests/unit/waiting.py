"""Waiting for something, with a deadline."""

import time
from collections.abc import Callable

DEADLINE_SECONDS = 20.0


def until(holds: Callable[[], object], what: str = "it") -> None:
    """Wait until it holds. Fails after DEADLINE_SECONDS."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not come about"
        time.sleep(0.01)
