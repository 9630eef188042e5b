"""A machine that is short of threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def no_threads(name: str) -> Iterator[None]:
    """No thread can be started whose name begins so, as CPython has it."""
    start = threading.Thread.start

    def started(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        start(thread)

    with mock.patch.object(threading.Thread, "start", started):
        yield
