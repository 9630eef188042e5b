"""When a request goes to a replica: at once if there is room, else in its turn, or not at all if that would be too late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from math import ceil
from typing import Protocol

from gateway.errors import Unavailable
from gateway.limits.fair_queue import FairQueue
from gateway.limits.shapes import QueueStats

LOOK_SECONDS = 1.0
"""How often one that waits looks for room."""
_SMOOTHING = 0.1  # the weight of the newest interval
_NO_PLACE = "all places to wait are taken"


class QueueFull(Unavailable):
    """There is no place to wait, or the request's turn would come too late: `expected` seconds is how long one waits now."""

    code = "queue_full"

    def __init__(self, why: str, expected: float) -> None:
        seconds = max(1, ceil(expected))
        text = f"Too many requests are waiting for a replica: {why}. The expected wait is about {seconds} s."
        super().__init__(text, retry_after_seconds=seconds)


class AdmissionSettings(Protocol):
    """What it needs of the settings."""

    @property
    def replica_requests_max(self) -> int: ...
    @property
    def queue_requests_max(self) -> int: ...
    @property
    def queue_seconds_max(self) -> float: ...


class Admission:
    """Belongs to one event loop. `ready` is how many replicas take requests; each gets `replica_requests_max` at once."""

    def __init__(
        self, settings: AdmissionSettings, ready: Callable[[], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stats = QueueStats()
        self._per_replica = settings.replica_requests_max
        self._seconds_max = settings.queue_seconds_max
        self._ready = ready
        self._clock = clock
        self._queue = FairQueue(settings.queue_requests_max)
        self._turns: dict[int, asyncio.Future[bool]] = {}  # whether the turn has come, or the place was lost
        self._running = 0
        self._left_at = 0.0
        self._interval_seconds = 0.0

    async def enter(
        self, tenant: str, rank: int, tokens: int, seconds_max: float | None = None, given: float | None = None
    ) -> None:
        """Wait for the turn of a request of so many uncached tokens, for `seconds_max` at most; `leave` has to follow.

        `given` are the seconds that its client gave it in all. Raises QueueFull.
        """
        if not len(self._queue) and self._has_room():
            self._running += 1
            return
        seconds = self._seconds_max if seconds_max is None else min(seconds_max, self._seconds_max)
        bound = seconds if given is None or seconds == self._seconds_max else given
        expected = self._expected(tenant, rank)
        # The first one may wait whatever was measured before: else an interval that is no longer true would stay for ever.
        place = self._queue.put(tenant, rank, tokens) if expected <= seconds or not len(self._queue) else None
        if place is None:
            late = f"its turn would come too late, as it may wait for {bound:g} s"
            raise self._refusal(_NO_PLACE if expected <= seconds else late, expected)
        if place.displaced is not None:
            self._tell(place.displaced, comes=False)
        began, turn = self._clock(), asyncio.get_running_loop().create_future()
        self._turns[place.number] = turn
        self.stats.waited_requests += 1
        self._let_in()
        try:
            async with asyncio.timeout(seconds):
                while not turn.done():
                    await asyncio.wait((turn,), timeout=LOOK_SECONDS)
                    self._let_in()  # replicas may have become ready meanwhile
                if not turn.result():
                    raise self._refusal(_NO_PLACE, self._expected(tenant, rank))
        except TimeoutError:
            self._give_up(turn)
            raise self._refusal(f"its turn did not come within {bound:g} s", self._expected(tenant, rank)) from None
        except asyncio.CancelledError:
            self._give_up(turn)
            raise
        finally:
            self._queue.remove(place.number)
            del self._turns[place.number]
            self.stats.waited_seconds += self._clock() - began

    def leave(self) -> None:
        """A request that was let in has ended."""
        now = self._clock()
        if len(self._queue) and self._left_at:
            self._interval_seconds += _SMOOTHING * (now - self._left_at - self._interval_seconds)
        self._left_at = now if len(self._queue) else 0.0
        self._running -= 1
        self._let_in()

    def shown(self) -> QueueStats:
        """The figures now."""
        return self.stats.model_copy(update={"waiting_requests": len(self._queue)})

    def _expected(self, tenant: str, rank: int) -> float:
        """In how many seconds the turn of a tenant's next request of a class would come."""
        return self._interval_seconds * (self._queue.ahead_of(tenant, rank) + 1)

    def _give_up(self, turn: asyncio.Future[bool]) -> None:
        """The turn may have come while it was being given up."""
        if turn.done() and not turn.cancelled() and turn.result():
            self.leave()

    def _has_room(self) -> bool:
        return self._running < self._per_replica * max(1, self._ready())

    def _let_in(self) -> None:
        while len(self._queue) and self._has_room():
            number = self._queue.take()
            assert number is not None
            self._running += self._tell(number, comes=True)

    def _tell(self, number: int, *, comes: bool) -> bool:
        """Say that the turn has come, or never will; False if it is being given up."""
        turn = self._turns[number]
        if turn.done():
            return False
        turn.set_result(comes)
        return True

    def _refusal(self, why: str, seconds: float) -> QueueFull:
        self.stats.refused_requests += 1
        return QueueFull(why, seconds)
