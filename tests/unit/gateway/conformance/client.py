"""What our client makes of the bytes that a replica answers."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from gateway.upstream.connection import ConnectionBroke, EngineConnection
from tests.unit.gateway.conformance.understood import BROKEN


class Replica:
    """The other end of a connection: it is written to in vain."""

    def __init__(self) -> None:
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0


class Got(NamedTuple):
    """An answer as the relay has it; `lines` are the headers that it passes on."""

    status: int
    lines: bytes
    body: bytes
    reusable: bool


class Client:
    """One connection."""

    def __init__(self, *, pumps: bool) -> None:
        self._pumps = pumps
        self._replica = Replica()
        self._connection = EngineConnection(asyncio.get_running_loop(), lambda _: None)
        self._connection.connection_made(self._replica)  # type: ignore[arg-type]

    async def ask(self, pieces: list[bytes], *, ends: bool) -> Got | str:
        """Send a request and get these pieces one after the other, and the connection's end if it `ends`.

        An answer that is not whole by then is broken. One that is reusable may be followed by another.
        """
        asking = asyncio.create_task(self._answer())
        await asyncio.sleep(0)
        for piece in pieces:
            if not self._replica.closed:
                self._connection.data_received(piece)
            await asyncio.sleep(0)
        if ends or not asking.done():
            await asyncio.sleep(0)
        if (ends or not asking.done()) and not self._replica.closed:
            self._replica.closed = True
            self._connection.connection_lost(None if ends else ConnectionResetError("reset"))
        got = await asking
        if not isinstance(got, Got):
            return got
        got = got._replace(reusable=self._connection.reusable)
        if got.reusable:
            self._connection.reset(0.0)
        return got

    async def _answer(self) -> Got | str:
        connection, parts = self._connection, list[bytes]()
        try:
            await connection.send(b"", [], 0)
            if self._pumps:
                await connection.pump(lambda part: parts.append(part) is None, _drained)
            else:
                while part := await connection.read():
                    parts.append(part)
        except ConnectionBroke:
            return BROKEN
        return Got(connection.head.status, connection.head.lines, b"".join(parts), False)


async def _drained() -> None:
    raise AssertionError("nobody is behind")
