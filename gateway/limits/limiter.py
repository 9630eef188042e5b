"""Limits at work: the book with a clock, the headers, the figures and the file. Belongs to the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from gateway.errors import ApiError
from gateway.limits.account import Limit, Rate, Shortage
from gateway.limits.book import LimitBook, Reservation
from gateway.limits.prices import Prices, Usage
from gateway.limits.refusals import refusal
from gateway.limits.shapes import KeyUse, LimitUse, TenantUse
from gateway.limits.state_file import StateFile
from gateway.tenants.keys import Key, Keys

WRITE_SECONDS = 1.0
TENANTS_SHOWN_MAX = 256
OTHERS = "(others)"
"""Stands for the tenants beyond TENANTS_SHOWN_MAX, which no tenant's name can be."""


class Limiter:
    """`clock` gives Unix time in seconds, `keys` the keys file's content."""

    def __init__(
        self,
        prices: Prices,
        *,
        reservation_seconds: float,
        keys: Callable[[], Keys | None] = lambda: None,
        file: StateFile | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.prices = prices
        self.book = LimitBook(reservation_seconds)
        self._keys = keys
        self._file = file
        self._clock = clock
        self._uses: dict[str, TenantUse] = {}
        self._changed = False
        if file is not None:
            self.book.restore(file.open())

    def begin(self, key: Key) -> Reservation:
        """Let a request in. Raises ApiError when a limit on requests is reached, or a budget is used up."""
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
        now = self._clock()
        short = self.book.hold(reservation.id, self.prices.charge(usage), now)
        if short is not None:
            self.book.withdraw(reservation.id, now)
            self._use(reservation.key).requests -= 1
            raise self._refused(reservation.key, short, assumed)

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

    def count_refusal(self, key: Key, reason: str) -> None:
        """Count a request that was refused for something else than a limit."""
        self._use(key).refused[reason] += 1

    def header_lines(self, key: Key) -> bytes:
        """The answer's headers that tell of limits, from those with the least left."""
        now = self._clock()
        account = self.book.account(key, now)
        requests, tokens = account.request_rate(key, now), account.token_rate(key, now)
        return _lines(b"requests", requests) + _lines(b"tokens", tokens)

    def uses(self) -> list[TenantUse]:
        """What each tenant used, with its keys that have limits."""
        now, found = self._clock(), {name: use.model_copy(update={"keys": []}) for name, use in self._uses.items()}
        keys = self._keys()
        for key in keys.keys if keys is not None else ():
            if key.is_limited and key.revoked is None:
                name = key.tenant if key.tenant in found or len(found) < TENANTS_SHOWN_MAX else OTHERS
                found.setdefault(name, TenantUse(tenant=name)).keys.append(self._key_use(key, now))
        return list(found.values())

    async def run(self) -> None:
        """Write the state whenever it has changed, and let reservations run out, for ever."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            self.book.expire(self._clock())
            if self._changed and self._file is not None and self._file.is_ours:
                self._changed = False
                await asyncio.to_thread(self._file.write, self._content())

    def close(self) -> None:
        """Write the state for the last time."""
        if self._file is not None:
            self._file.write(self._content())
            self._file.close()

    def _content(self) -> bytes:
        keys = self._keys()
        if keys is not None:
            self.book.keep(key.name for key in keys.keys)
        assert self._file is not None
        return self._file.encode(self.book.state())

    def _key_use(self, key: Key, now: float) -> KeyUse:
        account = self.book.account(key, now)
        limits: Iterable[tuple[Limit, int | None]] = ((limit, getattr(key, limit)) for limit in Limit)
        uses = {str(limit): LimitUse(limit=most, used=account.used(limit)) for limit, most in limits if most is not None}
        return KeyUse(key=key.name, requests_in_flight=account.running, limits=uses)

    def _refused(self, key: Key, short: Shortage, assumed: int | None = None) -> ApiError:
        self.count_refusal(key, short.limit)
        return refusal(key.name, short, assumed)

    def _use(self, key: Key) -> TenantUse:
        use = self._uses.get(key.tenant)
        if use is None:
            name = key.tenant if len(self._uses) < TENANTS_SHOWN_MAX else OTHERS
            use = self._uses.setdefault(name, TenantUse(tenant=name))
        return use


def _lines(kind: bytes, rate: Rate | None) -> bytes:
    if rate is None:
        return b""
    reset = _duration(rate.reset_seconds)
    return b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %b\r\n" % (
        *(kind, rate.limit, kind, rate.remaining),
        *(kind, reset),
    )


def _duration(seconds: float) -> bytes:
    """As OpenAI writes them: 20ms, 7s, 6m0s, 23h59m59s."""
    if seconds < 1:
        return b"%dms" % round(seconds * 1000)
    whole = int(-(-seconds // 1))
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, whole % 60)
    return b"%dm%ds" % (minutes, whole % 60) if minutes else b"%ds" % whole
