"""Ordering of loads and stores to shared memory on processors that may reorder them."""

import platform
import threading
from collections.abc import Callable

_lock = threading.Lock()


def _none() -> None:
    """x86-64 keeps loads in order and stores in order (Intel SDM vol. 3A, 9.2.3.2): nothing to do."""


def _two_rounds() -> None:
    """A release followed by an acquire of the same lock orders what is before against what is after (Armv8 STLR/LDAR)."""
    with _lock:
        pass
    with _lock:
        pass


fence: Callable[[], None] = _none if platform.machine() in ("x86_64", "AMD64") else _two_rounds
