"""One request being answered: its head, its body, its answer, and its end if the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

from gateway.cycle import RawHeaders, Scope, cycle_of
from gateway.errors import ApiError, BodyTooLarge, InvalidRequest, error_body
from gateway.request_ids import sane_request_id

_JSON = (b"content-type", b"application/json")


class ClientLeft(Exception):
    """The client closed the connection; nobody waits for an answer."""


class Exchange:
    """One request and its answer.

    `write` sends a part of the answer, and is False when the client does not keep up: wait for `drained`.

    Belongs to the task of its cycle. While it is watched, the client's leaving sets `left` and cancels that task;
    `end` does the same with an error that the client shall get. `answering` is called when the answer begins, and gives the
    value of its header x-peerkv-cache, or nothing.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.replica = b""
        self.answering: Callable[[], bytes] | None = None
        self.left = False
        self.ending: ApiError | None = None
        self.status = 0
        self.came_at = time.perf_counter()
        self.begun_at = 0.0
        self.is_event_stream = False
        self.body_bytes = 0
        self._cycle = cycle_of(scope)
        self.write: Callable[[bytes], bool] = self._cycle.write
        self._task = self._cycle.task
        header = dict(scope["headers"]).get  # of a header that occurs twice the last one counts
        self.authorization: bytes | None = header(b"authorization")
        self.content_type: bytes = header(b"content-type", b"")
        length: bytes = header(b"content-length", b"")
        self.content_length = int(length.lstrip(b"0") or b"0") if length.isdigit() else None
        self.accept: bytes = header(b"accept", b"")
        pinned: bytes | None = header(b"x-peerkv-replica")
        self.pinned = None if pinned is None else pinned.decode("latin-1")
        self.request_id = sane_request_id(header(b"x-request-id"))

    @property
    def begun(self) -> bool:
        """Whether the answer's head was sent."""
        return self.status != 0

    async def read_body(self, hold: Callable[[int], None], *, bytes_max: int, seconds_max: float) -> bytes:
        """The whole body. `hold` is told of bytes about to be held and may raise.

        Raises BodyTooLarge, InvalidRequest (408) when it does not come in time, ClientLeft.
        """
        if (self.content_length or 0) > bytes_max:
            raise BodyTooLarge(bytes_max)
        cycle = self._cycle
        if not cycle.more_body:
            return self._counted(cycle.take(), hold, bytes_max)
        try:
            async with asyncio.timeout(seconds_max):
                return await self._read_parts(hold, bytes_max)
        except TimeoutError:
            raise InvalidRequest(f"The body did not come within {seconds_max:g} s.", status=408) from None

    async def _read_parts(self, hold: Callable[[int], None], bytes_max: int) -> bytes:
        cycle, parts = self._cycle, []
        while True:
            parts.append(self._counted(await cycle.part(), hold, bytes_max))
            if not cycle.more_body:
                return b"".join(parts)

    def _counted(self, part: bytes | None, hold: Callable[[int], None], bytes_max: int) -> bytes:
        if part is None:
            raise ClientLeft
        if self.body_bytes + len(part) > bytes_max:
            raise BodyTooLarge(bytes_max)
        hold(len(part))
        self.body_bytes += len(part)
        return part

    def watch(self) -> None:
        """Cancel the task from now on when the client leaves. The body must have been read. Raises ClientLeft."""
        if self._cycle.left:
            raise ClientLeft
        self._cycle.on_left = self._client_left

    def _client_left(self) -> None:
        if self._task is not None:
            self.left = True
            self._task.cancel()

    def unwatch(self) -> None:
        """Do not cancel the task any more; idempotent."""
        self._task = None
        self._cycle.on_left = None

    def end(self, error: ApiError) -> None:
        """End the exchange with this error, unless its answer is complete already."""
        if self._task is not None:
            self.ending = error
            self._task.cancel()

    def begin(self, status: int, headers: RawHeaders, *, is_event_stream: bool = False) -> None:
        """Begin the answer; its head leaves with the first bytes of its body."""
        self.status = status
        self.begun_at = time.perf_counter()
        self.is_event_stream = is_event_stream
        headers.append((b"x-request-id", self.request_id.encode()))
        if self.replica:
            headers.append((b"x-peerkv-replica", self.replica))
        if self.answering is not None and (cache := self.answering()):
            headers.append((b"x-peerkv-cache", cache))
        self._cycle.start(status, headers)

    async def drained(self) -> None:
        """Wait until the client has read enough for more, or is gone."""
        await self._cycle.drained()

    def answer(self, status: int, headers: RawHeaders, body: bytes) -> None:
        """Send a whole answer."""
        self.unwatch()
        headers.append((b"content-length", b"%d" % len(body)))
        self.begin(status, headers)
        self._cycle.end(body)

    def finish(self, last: bytes = b"") -> None:
        """Send the end of a streamed answer."""
        self.unwatch()
        self._cycle.end(last)

    def fail(self, error: ApiError) -> None:
        """Tell the client, in whatever way is still possible.

        An event stream ends with an error event. Any other answer that has begun is left incomplete, and the
        server closes the connection.
        """
        self.unwatch()
        if not self.begun:
            self.answer(error.status, [_JSON, *_raw(error.headers.items())], error.body())
        elif self.is_event_stream:
            event = error_body(error.message, type=error.type, code=error.code, param=error.param)
            self.finish(b"data: " + event + b"\n\n")


def _raw(headers: Iterable[tuple[str, str]]) -> RawHeaders:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
