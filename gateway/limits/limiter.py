"""Limits at work: the book with a clock, the headers, the figures and the file. Belongs to the event loop's thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache
from math import ceil

import msgspec

from gateway.errors import ApiError
from gateway.limits.account import Limit, Rate, Shortage
from gateway.limits.book import LimitBook, Reservation
from gateway.limits.prices import Prices, Usage
from gateway.limits.refusals import refusal
from gateway.limits.shapes import KeyUse, LimitUse, TenantUse, by_limit
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.limits.state_file import StateFile
from gateway.tenants.keys import Key, Keys

WRITE_SECONDS = 1.0
DEFECT_SECONDS = 60.0
"""After an error that nobody foresaw, so long until what it ended begins again."""
TENANTS_SHOWN_MAX = 256
OTHERS = "(others)"
"""Stands for the tenants beyond TENANTS_SHOWN_MAX, which no tenant's name can be."""
DURATIONS_KEPT = 1024
_REQUESTS, _TOKENS = (
    b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n" % (kind, kind, kind)
    for kind in (b"requests", b"tokens")
)
_logger = logging.getLogger(__name__)


class Limiter:
    """`clock` gives Unix time in seconds, `keys` the keys file's content, `shared` counts for several gateways.

    What a key has too little of by the gateway's own count it has too little of by that of all: so that count is asked first.
    """

    def __init__(
        self,
        prices: Prices,
        *,
        reservation_seconds: float,
        keys: Callable[[], Keys | None] = lambda: None,
        file: StateFile | None = None,
        shared: SharedLimits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.prices = prices
        self.book = LimitBook(reservation_seconds)
        self._keys = keys
        self._file = file
        self.shared = shared
        self._clock = clock
        self._uses: dict[str, _Use] = {}
        self._changed = False
        if file is not None:
            self.book.restore(file.open())

    def begin(self, key: Key) -> Reservation:
        """Let a request in. Raises ApiError when a limit on requests is reached, or a budget is used up."""
        found: Reservation | Shortage | None = None if self.shared is None else self.shared.refusal(key)
        if found is None:
            found = self.book.begin(key, self._clock())
        if isinstance(found, Shortage):
            raise self._refused(key, found)
        self._use(key).requests += 1
        self._changed = True
        return found

    def hold(self, reservation: Reservation, usage: Usage, assumed: int | None = None) -> None:
        """Hold what a request may come to, with `assumed` tokens for an answer whose `max_tokens` it does not name.

        Raises ApiError when that is too much; then it counts for nothing.
        """
        short = self.book.hold(reservation.id, self.prices.charge(usage), self._clock())
        if short is not None:
            raise self._withdrawn(reservation, short, assumed)

    async def agree(self, reservation: Reservation, assumed: int | None = None) -> None:
        """Have what is held counted by all gateways that share limits, if they do. Raises ApiError as `hold`."""
        if self.shared is not None and reservation.key.is_counted:
            short = await self.shared.reserve(reservation)
            if short is not None:
                raise self._withdrawn(reservation, short, assumed)

    def settle(self, reservation: Reservation, usage: Usage) -> None:
        """Charge what a request used, once: any further call changes nothing."""
        charged = self.prices.charge(usage)
        if self.book.settle(reservation.id, charged, self._clock()):
            use = self._use(reservation.key)
            use.uncached_tokens += usage.uncached_tokens
            use.cached_tokens += usage.cached_tokens
            use.generated_tokens += usage.generated_tokens
            use.charged_tokens += charged
            self._changed = True
            if self.shared is not None and reservation.key.is_counted:
                self.shared.settle(reservation, charged)

    def count_refusal(self, key: Key, reason: str) -> None:
        """Count a request that was refused for something else than a limit."""
        self._use(key).refused[reason] += 1

    def header_lines(self, key: Key) -> bytes:
        """The answer's headers that tell of limits, from those with the least left."""
        now = self._clock()
        account = self.book.account(key, now)
        requests, tokens = account.request_rate(key, now), account.token_rate(key, now)
        if self.shared is not None and (known := self.shared.account(key.name)) is not None:
            account, now = known
            requests = _less(account.request_rate(key, now), requests)
            tokens = _less(account.token_rate(key, now), tokens)
        return _lines(_REQUESTS, requests) + _lines(_TOKENS, tokens)

    def uses(self) -> list[TenantUse]:
        """What each tenant used, with its keys that have limits."""
        now = self._clock()
        found = {name: TenantUse(tenant=name, **msgspec.structs.asdict(use)) for name, use in self._uses.items()}
        keys = self._keys()
        for key in keys.keys if keys is not None else ():
            if key.is_limited and key.revoked is None:
                name = key.tenant if key.tenant in found or len(found) < TENANTS_SHOWN_MAX else OTHERS
                found.setdefault(name, TenantUse(tenant=name)).keys.append(self._key_use(key, now))
        return list(found.values())

    async def run(self) -> None:
        """Write the state whenever it has changed, and let reservations run out, for ever."""
        shared = self.shared
        async with asyncio.TaskGroup() as tasks:
            if shared is not None:
                tasks.create_task(_for_ever("the connection to the server of limits", lambda: shared.run(self.book.under_way)))
            tasks.create_task(_for_ever("the keeping of limits", self._keep))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            self.book.expire(self._clock())
            if self._changed and self._file is not None and self._file.is_ours:
                self._changed = False
                await asyncio.to_thread(self._file.write, self._content())

    async def close(self) -> None:
        """Tell and write the state for the last time."""
        if self.shared is not None:
            await self.shared.close()
        if self._file is not None:
            self._file.write(self._content())
            self._file.close()

    def _content(self) -> bytes:
        keys = self._keys()
        if keys is not None:
            self.book.keep(key.name for key in keys.keys)
            if self.shared is not None:
                self.shared.keep(key.name for key in keys.keys)
        assert self._file is not None
        return self._file.encode(self.book.state())

    def _key_use(self, key: Key, now: float) -> KeyUse:
        account = self.book.account(key, now)
        running = account.running
        if self.shared is not None and (known := self.shared.account(key.name)) is not None:
            account = known[0]
        limits: Iterable[tuple[Limit, int | None]] = ((limit, getattr(key, limit)) for limit in Limit)
        uses = {str(limit): LimitUse(limit=most, used=account.used(limit)) for limit, most in limits if most is not None}
        return KeyUse(key=key.name, requests_in_flight=running, limits=uses)

    def _withdrawn(self, reservation: Reservation, short: Shortage, assumed: int | None) -> ApiError:
        self.book.withdraw(reservation.id, self._clock())
        self._use(reservation.key).requests -= 1
        return self._refused(reservation.key, short, assumed)

    def _refused(self, key: Key, short: Shortage, assumed: int | None = None) -> ApiError:
        self.count_refusal(key, short.limit)
        return refusal(key.name, short, assumed)

    def _use(self, key: Key) -> _Use:
        use = self._uses.get(key.tenant)
        if use is None:
            name = key.tenant if len(self._uses) < TENANTS_SHOWN_MAX else OTHERS
            use = self._uses.setdefault(name, _Use())
        return use


class _Use(msgspec.Struct):
    """The counts of a TenantUse, cheap to change."""

    requests: int = 0
    uncached_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    charged_tokens: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=by_limit)


async def _for_ever(what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do work that never ends, and begin it again after a defect, which leaves the work beside it alone."""
    while True:
        try:
            await work()
        except Exception:  # whatever it was, limits have to be counted
            _logger.exception("%s failed, and begins again in %g s", what, DEFECT_SECONDS)
        await asyncio.sleep(DEFECT_SECONDS)


def _less(first: Rate | None, second: Rate | None) -> Rate | None:
    """Of two rates, which are both there or not, that with less left."""
    return second if first is None or (second is not None and second.remaining < first.remaining) else first


def _lines(form: bytes, rate: Rate | None) -> bytes:
    return b"" if rate is None else form % (rate.limit, rate.remaining, _duration(rate.reset_seconds))


def _duration(seconds: float) -> bytes:
    """As OpenAI writes them: 20ms, 7s, 6m0s, 23h59m59s."""
    return b"%dms" % round(seconds * 1000) if seconds < 1 else _whole_seconds(ceil(seconds))


@lru_cache(DURATIONS_KEPT)
def _whole_seconds(seconds: int) -> bytes:
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, seconds % 60)
    return b"%dm%ds" % (minutes, seconds % 60) if minutes else b"%ds" % seconds
