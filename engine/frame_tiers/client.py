"""A gateway's side: asks for prompts to be brought up, has everything flushed, hears the figures. Nothing waits for long."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from engine.frame_tiers.messages import (
    LENGTH,
    MESSAGE_BYTES_MAX,
    Flush,
    Flushed,
    Pin,
    Promote,
    Promoted,
    TierStats,
    Unpin,
    decode_answer,
    encode,
)
from engine.frame_tiers.standing import Standing
from engine.frame_tiers.store import StoreName

_logger = logging.getLogger("peerkv.tiers")

RECONNECT_SECONDS = 1.0
ASKED_MAX = 256
"""Prompts that are asked for at once; others are computed."""
FLUSH_SECONDS_MAX = 60.0
GRACE_SECONDS = 0.05
"""How long after its time an answer still may come: it says what came up in that time."""


class TierClient:
    """Connects to `socket` for as long as `run` runs, and logs when one of its stores goes off or comes back.

    `wanted` are the stores that there should be, as far as that is known. Belongs to one event loop.
    """

    def __init__(self, socket: Path, wanted: Sequence[StoreName] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._socket = socket
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Promoted | Flushed | None]] = {}
        self.latest: TierStats | None = None
        """The figures as last heard; None while nobody tells any."""
        self._clock = clock
        self._pins: dict[int, tuple[tuple[Pin, ...], float]] = {}
        self._standing = Standing(wanted, clock())

    async def run(self) -> None:
        """Keep a connection, for ever."""
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, msgspec.MsgspecError):
                await self._connected()
            self._writer, self.latest = None, None
            self._hear(None)
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_result(None)
            await asyncio.sleep(RECONNECT_SECONDS)

    def warnings(self) -> list[str]:
        """What is wrong with each store that is not in use, and what to do."""
        return self._standing.warnings()

    def _hear(self, stats: TierStats | None) -> None:
        for line in self._standing.hear(stats, self._clock()):
            _logger.warning("%s", line)

    async def promote(self, fingerprint: bytes, keys: bytes, begin: int, seconds: float, *, lossy: bool) -> Promoted | None:
        """Ask for what a prompt lacks behind its first `begin` tokens; None if there is no answer in time."""
        if len(self._waiting) >= ASKED_MAX:
            return None
        number = next(self._numbers)
        ask = Promote(number, fingerprint, keys, begin, seconds, lossy)
        found = await self._ask(number, encode(ask), seconds + GRACE_SECONDS)
        return found if isinstance(found, Promoted) else None

    def pin(self, number: int, chains: Iterable[tuple[bytes, bytes]], seconds: float) -> None:
        """Have a prefix kept for so long, of whose chains these are the fingerprints and the keys; also by a process that is
        started again meanwhile."""
        now = self._clock()
        self._pins = {each: pin for each, pin in self._pins.items() if pin[1] > now}
        pins = tuple(Pin(number, fingerprint, keys, seconds) for fingerprint, keys in chains)
        self._pins[number] = pins, now + seconds
        self._tell(pins)

    def unpin(self, number: int) -> None:
        """A prefix need not be kept any more."""
        if self._pins.pop(number, None) is not None:
            self._tell([Unpin(number)])

    def _tell(self, messages: Iterable[Pin | Unpin]) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(b"".join(map(encode, messages)))

    def _tell_pins(self) -> None:
        """A process that was just connected to may know of none."""
        now = self._clock()
        for pins, until in self._pins.values():
            if until > now:
                self._tell([msgspec.structs.replace(pin, seconds=until - now) for pin in pins])

    async def flush(self) -> dict[str, str]:
        """Have every store emptied; return why each was not, "" if it was; nothing if there are none."""
        self._pins.clear()
        number = next(self._numbers)
        found = await self._ask(number, encode(Flush(number)), FLUSH_SECONDS_MAX)
        if isinstance(found, Flushed):
            return found.stores
        return dict.fromkeys(self._standing.known, "its process does not answer: flush again when it does")

    async def _ask(self, number: int, message: bytes, seconds: float) -> Promoted | Flushed | None:
        if self._writer is None:
            return None
        waiting: asyncio.Future[Promoted | Flushed | None] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        try:
            self._writer.write(message)
            async with asyncio.timeout(seconds):
                return await waiting
        except (TimeoutError, OSError):
            return None
        finally:
            del self._waiting[number]

    async def _connected(self) -> None:
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            while True:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                if size > MESSAGE_BYTES_MAX:
                    return
                answer = decode_answer(await reader.readexactly(size))
                if isinstance(answer, TierStats):
                    fresh = self._writer is not writer
                    self.latest, self._writer = answer, writer
                    if fresh:
                        self._tell_pins()
                    self._hear(answer)
                elif (waiting := self._waiting.get(answer.id)) is not None and not waiting.done():
                    waiting.set_result(answer)
        finally:
            self._writer = None
            writer.close()
