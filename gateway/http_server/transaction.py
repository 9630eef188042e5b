"""One request being answered: its head, its body, its answer, and its end if the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from gateway.api.dialects import error_answer, error_event
from gateway.api.endpoints import Dialect
from gateway.errors import ApiError, BodyTooLarge, InvalidRequest
from gateway.http_server.content_encoding import decoded
from gateway.http_server.head_fields import HeadFields, content_length, fresh_id
from gateway.http_server.request_cycle import Scope, cycle_of

JSON_LINE = b"content-type: application/json\r\n"
"""The header of an answer in JSON, and of a request."""


class ClientLeft(Exception):
    """The client closed the connection; nobody waits for an answer."""


class Transaction:
    """One request and its answer.

    `write` sends a part of the answer, and is False when the client does not keep up: wait for `drained`.

    Belongs to the task of its cycle. While it is watched, the client's leaving sets `left` and cancels that task;
    `end` does the same with an error that the client is to get. `answering` is called when the answer begins, and gives the
    value of its header x-peerkv-cache, or nothing. `more_lines` is called for each answer, and gives further headers of it;
    whoever serves the transaction calls `on_end` when it is over.
    """

    def __init__(self, scope: Scope, dialect: Dialect = "openai") -> None:
        self.scope = scope
        self.dialect = dialect
        self.replica = b""
        self.answering: Callable[[], bytes] | None = None
        self.more_lines: Callable[[], bytes] | None = None
        self.on_end: Callable[[], None] | None = None
        self.left = False
        self.ending: ApiError | None = None
        self.status = 0
        self.came_at = time.perf_counter()
        self.begun_at = 0.0
        self.is_event_stream = False
        self.quiet_since: float | None = None
        """While it waits for a stream's first event: when it, or the last comment, was sent. In time.perf_counter's seconds."""
        self.body_bytes = 0
        self._head_left = False
        self.leave_turn: Callable[[], None] | None = None
        """To be called at its end if it was let in to replicas of which each gets so many at once."""
        self.has_slot = False
        self._deadline: asyncio.TimerHandle | None = None
        """Whether it counts as being served."""
        self._cycle = cycle = cycle_of(scope)
        self._task = cycle.task
        self.write = cycle.write
        self.fields = fields = cycle.fields or HeadFields.of(scope["headers"])
        self.request_id = fields.request_id or fresh_id()

    @property
    def begun(self) -> bool:
        """Whether the client got a part of the answer other than comments."""
        return self.status != 0

    @property
    def begun_well(self) -> bool:
        """Whether what the client got is part of an answer rather than an error."""
        return 0 < self.status < 400

    def body_at_hand(self, hold: Callable[[int], None], bytes_max: int) -> bytes | None:
        """All of the body if it is there, as `read_body` gives it."""
        cycle = self._cycle
        return None if cycle.more_body else self._counted(cycle.take(), hold, bytes_max)

    async def read_body(self, hold: Callable[[int], None], bytes_max: int, seconds_max: float) -> bytes | bytearray:
        """The whole body, put together as it comes. `hold` is told of bytes about to be held and may raise.

        Raises BodyTooLarge, InvalidRequest (408) when it does not come in time, ClientLeft.
        """
        if content_length(self.scope["headers"]) > bytes_max:
            raise BodyTooLarge(bytes_max)
        try:
            async with asyncio.timeout(seconds_max):
                return await self._read_parts(hold, bytes_max)
        except TimeoutError:
            raise InvalidRequest(f"The body did not come within {seconds_max:g} s.", status=408) from None

    async def decode_body(self, body: bytes | bytearray, hold: Callable[[int], None], bytes_max: int) -> bytes:
        """The content of a body that came in `fields.encoding`. `hold` as above. Raises ApiError."""

        def counted(size: int) -> None:
            hold(size)
            self.body_bytes += size

        return await decoded(body, self.fields.encoding or b"", counted, bytes_max)

    async def _read_parts(self, hold: Callable[[int], None], bytes_max: int) -> bytes | bytearray:
        cycle, whole = self._cycle, bytearray()
        while True:
            # Joined in the end, 30 MB would keep all others waiting for tens of milliseconds.
            whole += self._counted(await cycle.part(), hold, bytes_max)
            if not cycle.more_body:
                return whole

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
        """Stop cancelling the task. Idempotent."""
        self._task = None
        self._cycle.on_left = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None  # which refers to the transaction

    def end(self, error: ApiError) -> None:
        """End the transaction with this error, unless its answer is complete already."""
        if self._task is not None:
            self.ending = error
            self._task.cancel()

    def begin_within(self, seconds: float, error: ApiError) -> None:
        """End the transaction with this error if its answer has not begun by then."""
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._is_late, error)

    def _is_late(self, error: ApiError) -> None:
        if not self.begun:
            self.end(error)

    def begin(self, status: int, lines: bytes, *, is_event_stream: bool = False) -> None:
        """Begin the answer, `lines` among its headers; its head leaves with the first bytes of its body, if not before."""
        self.status = status
        self.begun_at = time.perf_counter()
        self.is_event_stream = is_event_stream
        lines += self._own_lines()
        if self.answering is not None and (cache := self.answering()):
            lines += b"x-peerkv-cache: %b\r\n" % cache
        if not self._head_left:
            self._cycle.begin(status, lines)

    def comment(self, status: int, lines: bytes, comment: bytes) -> bool:
        """Send a comment ahead of an event stream's first event, as `write` does: the answer has not begun, and another
        replica may still give it. Its head leaves without what is known only then: x-peerkv-cache, and the replica."""
        if not self._head_left:
            self._head_left = self.is_event_stream = True
            self._cycle.begin(status, lines + self._own_lines(replica=False))
        return self.write(comment)

    async def drained(self) -> None:
        """Wait until the client has read enough to take more, or is gone."""
        await self._cycle.drained()

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole answer, `lines` among its headers; after comments it is the stream's one event."""
        self.unwatch()
        self.status = status
        self.begun_at = time.perf_counter()
        if self._head_left:
            name = b"" if self.dialect == "openai" else b"event: error\n"
            self.finish(b"%bdata: %b\n\n" % (name, body))
            return
        self._cycle.answer(status, b"%bcontent-length: %d\r\n%b" % (lines, len(body), self._own_lines()), body)

    def _own_lines(self, *, replica: bool = True) -> bytes:
        """The headers that we add to every answer."""
        more = b"" if self.more_lines is None else self.more_lines()
        if replica and self.replica:
            return b"%bx-request-id: %b\r\nx-peerkv-replica: %b\r\n" % (more, self.request_id.encode(), self.replica)
        return b"%bx-request-id: %b\r\n" % (more, self.request_id.encode())

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
            body = error_answer(self.dialect, error.status, error.body())
            self.answer(error.status, JSON_LINE + header_lines(error.headers), body)
        elif self.is_event_stream:
            self.finish(error_event(self.dialect, error))


def header_lines(headers: Mapping[str, str]) -> bytes:
    """Headers as they are sent."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode("latin-1")
