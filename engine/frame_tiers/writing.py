"""Frames on their way into a store: a bounded queue and a thread of its own, so that a slow store holds up nobody."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from engine.frame_tiers.store import FrameId, FrameStore

_logger = logging.getLogger("peerkv.tiers")

QUEUE_BYTES_MAX = 64 << 20
TOGETHER_BYTES = 8 << 20
TEND_SECONDS = 1.0


class Writer:
    """Writes to `store` until it is closed."""

    def __init__(self, store: FrameStore, queue_bytes_max: int = QUEUE_BYTES_MAX) -> None:
        self.store = store
        self.dropped = 0
        """Frames that found no room in the queue."""
        self._queue: deque[tuple[FrameId, bytes]] = deque()
        self._bytes = 0
        self._bytes_max = queue_bytes_max
        self._changed = threading.Condition()
        self._putting = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"peerkv-{store.name}-writer", daemon=True)
        self._thread.start()

    def offer(self, each: FrameId, frame: bytes, wait_seconds: float, wanted: Callable[[], bool] = lambda: True) -> bool:
        """Queue a frame; if the queue is full, wait for room, but not where the store takes nothing now. False if dropped.

        One that is not `wanted` any more, as there was a flush while it waited, is not queued.
        """
        deadline = time.monotonic() + wait_seconds
        with self._changed:
            while self._bytes and self._bytes + len(frame) > self._bytes_max and not self._closed:
                left = deadline - time.monotonic()
                if left <= 0 or not self.store.ready():
                    break
                self._changed.wait(left)
            if not wanted():
                return False
            if self._closed or (self._bytes and self._bytes + len(frame) > self._bytes_max):
                self.dropped += 1
                return False
            self._queue.append((each, frame))
            self._bytes += len(frame)
            self._changed.notify_all()
            return True

    def flush(self) -> str:
        """Forget what is queued and all that the store has; return why that failed, "" if it did not."""
        with self._putting:
            with self._changed:
                self._queue.clear()
                self._bytes = 0
                self._changed.notify_all()
            return self.store.flush()

    def drained(self) -> bool:
        """Whether nothing is queued or being written."""
        with self._changed:
            return not self._queue and not self._putting.locked()

    def close(self, seconds: float) -> None:
        """Write what is queued, for at most `seconds`, and close the store."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while self._queue and time.monotonic() < deadline and self.store.ready():
                self._changed.wait(0.1)
            self._closed = True
            self._changed.notify_all()
        self._thread.join(max(0.1, deadline - time.monotonic()))
        self.store.close()

    def _run(self) -> None:
        tended = time.monotonic()
        while True:
            with self._changed:
                if not self._queue and not self._closed:
                    self._changed.wait(TEND_SECONDS)
                if self._closed:
                    return
            try:
                with self._putting:
                    batch = self._taken()
                    if batch:
                        self.store.put(batch)
                if time.monotonic() - tended >= TEND_SECONDS:
                    self.store.tend()
                    tended = time.monotonic()
            except Exception as error:  # noqa: BLE001 - a store that fails in a new way must not end the writing for good
                _logger.error("%s: %r", self.store.name, error)

    def _taken(self) -> list[tuple[FrameId, bytes]]:
        with self._changed:
            batch, size = [], 0
            while self._queue and size < TOGETHER_BYTES:
                batch.append(self._queue.popleft())
                size += len(batch[-1][1])
            self._bytes -= size
            self._changed.notify_all()
            return batch
