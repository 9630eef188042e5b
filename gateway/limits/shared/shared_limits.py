"""The server of shared limits: connected to and asked. Belongs to the event loop's thread.

A request waits `wait_seconds_max` at most, once: a server that is late is not asked again until there is another connection.
Until then the gateway's own count decides, and what it counted is told afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.resp import VaultGone
from gateway.limits.account import Account, Shortage
from gateway.limits.book import Reservation
from gateway.limits.shapes import SharedLimitStats
from gateway.limits.shared.commands import LEASE_SECONDS
from gateway.limits.shared.line import Line
from gateway.limits.shared.shared_book import SharedBook, Verdict
from gateway.tenants.keys import Key

HOLD_SECONDS = LEASE_SECONDS / 3
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.1, 5.0
CLOSE_SECONDS_MAX = 1.0
_logger = logging.getLogger(__name__)


class SharedLimits:
    """Until `run` is run there is no connection but that of `connect`."""

    def __init__(self, address: VaultAddress, *, wait_seconds_max: float) -> None:
        """Raises OSError for certificates that cannot be read."""
        self._address = address
        self._context = address.context()
        self._wait_seconds = wait_seconds_max
        self._settled = asyncio.Event()
        self._book = SharedBook(secrets.token_hex(6), self._failed, self._settled.set)
        self._line: Line | None = None
        self._lost = asyncio.Event()
        self._why = "it was not asked yet"
        self._evicts = False
        self._told_of = False
        self._pause = PAUSE_SECONDS_MIN

    async def reserve(self, made: Reservation) -> Shortage | None:
        """Have it counted by all gateways; what there is too little of, if there is.

        None also where the server says nothing: then this gateway has let it in alone.
        """
        waiting: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()

        def verdict(found: Verdict) -> None:
            if not waiting.done():
                waiting.set_result(found)

        self._book.reserve(made, time.monotonic(), verdict)
        try:
            found = await waiting
        finally:
            self._book.forget(made)
        if found == "alone":
            self._book.alone_requests += 1
        else:
            self._pause = PAUSE_SECONDS_MIN
        if isinstance(found, Shortage):
            return found
        made.shared = "there" if found is None else "here"
        return None

    def settle(self, made: Reservation, tokens: int) -> None:
        """A request that was let in has ended, and is charged so many tokens: soon, if the server cannot be told now."""
        self._book.settle(made, tokens, time.monotonic())

    def refusal(self, key: Key) -> Shortage | None:
        """What the server lately said that there is too little of for any request of the key."""
        return self._book.refusal(key, time.monotonic())

    def account(self, name: str) -> tuple[Account, float] | None:
        """The account of a key as the server told of it last, and the server's time; None where it does not decide."""
        return self._book.account(name, time.monotonic())

    def keep(self, names: Iterable[str]) -> None:
        """Forget what was told of all other keys."""
        self._book.keep(names)

    def stats(self) -> SharedLimitStats:
        """How it went so far."""
        return self._book.stats()

    def warnings(self) -> list[str]:
        """What an operator should know."""
        shown = self._address.shown
        if not self._book.is_up:
            return [f"limits are counted by this gateway alone: {shown}: {self._why} (limits_valkey)"]
        if self._evicts:
            return [
                f"{shown} may forget what was used of limits when its memory is full: set its maxmemory-policy to noeviction"
            ]
        return []

    async def connect(self) -> None:
        """Try to get a connection; why there is none is logged, once."""
        try:
            line = await Line.open(self._address, self._context, self._wait_seconds, self._ended)
        except VaultGone as error:
            self._is_down(str(error))
            return
        self._line = line
        self._lost.clear()
        if self._told_of:
            self._told_of = False
            _logger.info("limits are counted at %s again", self._address.shown)
        self._book.connected(line)
        known, self._evicts = self._evicts, line.evicts
        if line.evicts and not known:
            _logger.warning("%s", *self.warnings())

    async def run(self, under_way: Callable[[], Iterable[Reservation]]) -> None:
        """Keep a connection, and what is `under_way` held there, for ever. After connections of no use the pauses grow."""
        while True:
            if self._line is None:
                await asyncio.sleep(self._pause)
                self._pause = min(2 * self._pause, PAUSE_SECONDS_MAX)
                await self.connect()
            else:
                try:
                    async with asyncio.timeout(HOLD_SECONDS):
                        await self._lost.wait()
                except TimeoutError:  # a connection that lasts is as good as an answer
                    self._pause = PAUSE_SECONDS_MIN
            self._book.hold(under_way())

    async def close(self) -> None:
        """Tell what was settled, if that can be done soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                while not self._book.is_settled:
                    self._settled.clear()
                    await self._settled.wait()
        line, self._line = self._line, None
        if line is not None:
            line.close()
            self._book.lost()

    def _failed(self, why: str) -> None:
        """What the server says cannot be used: another connection may do better."""
        line = self._line
        if line is not None:
            line.close()
            self._ended(why)

    def _ended(self, why: str) -> None:
        self._line = None
        self._is_down(why)
        self._book.lost()
        self._lost.set()

    def _is_down(self, why: str) -> None:
        self._why = why
        self._book.failures += 1
        if not self._told_of:
            self._told_of = True
            _logger.warning("limits are counted by this gateway alone: %s: %s", self._address.shown, why)
