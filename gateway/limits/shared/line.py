"""A connection to a Valkey server for commands that somebody waits for: sent as they come, with a deadline each."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import cast

from engine.frame_tiers.vault.address import VaultAddress
from engine.frame_tiers.vault.resp import Reply, VaultError, VaultGone, Word, hello, pieces, read_reply
from gateway.limits.shared.commands import LOAD

ANSWER_BYTES_MAX = 1 << 20
CONNECT_SECONDS_MAX = 2.0
GRACE_SECONDS = 0.01
"""After a deadline: where our own event loop stood still, the reply may be here, and not read yet."""

Done = Callable[[Reply], None]


class Line(asyncio.Protocol):
    """Replies come in the order of the commands. The first that is late, or is none, ends the connection: `lost` is told why.

    What had no reply then gets none.
    """

    def __init__(self, seconds: float, lost: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._seconds = seconds
        self._lost: Callable[[str], None] | None = lost
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: deque[tuple[float, Done]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._overdue = False
        self.evicts = False
        """Whether the server gives up what it holds when its memory is full."""

    @classmethod
    async def open(
        cls, address: VaultAddress, context: ssl.SSLContext | None, seconds: float, lost: Callable[[str], None]
    ) -> Line:
        """A connection that is let in, to a server that knows our script. Raises VaultGone."""
        line: Line | None = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                name = address.host if context is not None else None
                _, line = await asyncio.get_running_loop().create_connection(
                    lambda: cls(seconds, lost), address.host, address.port, ssl=context, server_hostname=name
                )
                for words in (*hello(address), LOAD):
                    if isinstance(reply := await line._ask(words), VaultError):
                        raise VaultGone(str(reply))
                line.evicts = _evicts(await line._ask((b"INFO", b"memory")))
                if line._transport is None:
                    raise VaultGone("the server closed the connection")
        except BaseException as error:
            if line is not None:
                line.close()
            if isinstance(error, TimeoutError):
                raise VaultGone("no answer in time") from None
            if isinstance(error, (OSError, ValueError)):
                raise VaultGone(f"no connection: {error}") from error
            raise
        return line

    def send(self, command: bytes, done: Done) -> None:
        """Send a command; `done` gets its reply, if one comes."""
        if self._transport is None:
            return
        self._waiting.append((self._loop.time() + self._seconds, done))
        self._transport.write(command)
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)

    def close(self) -> None:
        """Close it; nobody is told."""
        self._lost = None
        self._end("closed")

    async def _ask(self, words: Sequence[Word]) -> Reply:
        answer: asyncio.Future[Reply] = self._loop.create_future()

        def lost(why: str) -> None:
            if not answer.done():
                answer.set_exception(VaultGone(why))

        def done(reply: Reply) -> None:
            if not answer.done():
                answer.set_result(reply)

        told, self._lost = self._lost, lost
        try:
            if self._transport is None:
                raise VaultGone("the server closed the connection")
            self.send(b"".join(pieces(words)), done)
            return await answer
        finally:
            self._lost = told

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        begin = 0
        try:
            while begin < len(self._buffer) and (found := read_reply(self._buffer, begin)) is not None:
                reply, begin = found
                if not self._waiting:
                    raise VaultGone("an answer to nothing")
                self._waiting.popleft()[1](reply)
        except VaultGone as error:
            self._end(str(error))
            return
        del self._buffer[:begin]
        if len(self._buffer) > ANSWER_BYTES_MAX:
            self._end("an answer that is none")

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the server closed the connection" if error is None else f"the connection broke: {error}")

    def _look(self) -> None:
        """End the connection if the reply that is due next is late."""
        self._timer = None
        if not self._waiting:
            self._overdue = False
            return
        left = self._waiting[0][0] - self._loop.time()
        if left > 0:
            self._overdue = False
        elif self._overdue:
            self._end("no answer in time")
            return
        else:
            self._overdue, left = True, GRACE_SECONDS
        self._timer = self._loop.call_later(left, self._look)

    def _end(self, why: str) -> None:
        transport, self._transport = self._transport, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._waiting.clear()
        if transport is not None:
            transport.abort()
        lost, self._lost = self._lost, None
        if lost is not None:
            lost(why)


def _evicts(info: Reply) -> bool:
    """What INFO says of it; False if it is not told."""
    lines = info.decode("utf-8", "replace").splitlines() if isinstance(info, bytes) else []
    memory = dict(line.split(":", 1) for line in lines if ":" in line)
    return memory.get("maxmemory", "0") != "0" and memory.get("maxmemory_policy", "noeviction") != "noeviction"
