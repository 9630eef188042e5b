"""A replica's answer on its way to the client, byte for byte but for errors, which get OpenAI's form."""

from __future__ import annotations

import time

import msgspec

from gateway.api.engine_errors import ERROR_EVENT, error_code, events_in_our_form
from gateway.http_server.transaction import Transaction
from gateway.relay.hidden_usage import without_usage
from gateway.relay.request_record import RequestRecord
from gateway.upstream.answer_head import AnswerHead
from gateway.upstream.connection import EngineConnection

COMMENTS_HELD_SECONDS = 15.0
"""Keep-alive comments are for proxies, which wait for 30 s or more. For so long they wait for the first event, since with
them the head leaves, and x-peerkv-cache is not known before that event."""
_EVENT_END = b"\n\n"
_DATA = b"data: "
_LAST_EVENT = b"data: [DONE]\n\n"


class Answer(msgspec.Struct):
    """A replica's whole answer, not yet sent. `lines` are the headers that the client gets, as they are sent."""

    status: int
    lines: bytes
    body: bytes


def at_hand(response: EngineConnection) -> Answer | None:
    """The answer if all of it has arrived; None for an event stream, which is passed on as it comes."""
    head = response.head
    body = None if head.is_event_stream else response.at_hand()
    return None if body is None else Answer(head.status, head.lines, body)


async def pass_on(
    transaction: Transaction,
    response: EngineConnection,
    record: RequestRecord,
    *,
    bytes_max: int,
    hides_usage: bool = False,
) -> Answer | None:
    """The answer when it is whole and nothing of it was sent yet; None when it was streamed to the client.

    What a stream says of its tokens and of its failure is put into the `record`; the client does not get the usage if
    `hides_usage`.

    An answer of more than `bytes_max` bytes is streamed. Raises ConnectionBroke when the replica breaks off.
    """
    head = response.head
    if head.is_event_stream:
        events = _Events(transaction, head, bytes_max, hides_usage=hides_usage)
        try:
            await response.pump(events.take, transaction.drained)
            events.end()
        finally:
            events.tell(record)
        return None
    return await _collect(transaction, response, bytes_max)


class _Events:
    """Passes an event stream on. Only whole events are sent, so that an error event can follow any of them."""

    def __init__(self, transaction: Transaction, head: AnswerHead, bytes_max: int, *, hides_usage: bool = False) -> None:
        self._transaction, self._head, self._bytes_max, self._hides_usage = transaction, head, bytes_max, hides_usage
        self._held = self._comments = b""
        self._begun = False
        self._error = ""
        self._count = 0
        self._last = self._before = b""  # chunks: the counts of tokens are in the event before the last one
        self._came_at = time.monotonic()

    def take(self, chunk: bytes) -> bool:
        """Send the whole events; False when the client does not keep up."""
        if self._held:
            chunk, self._held = self._held + chunk, b""
        if not chunk.endswith(_EVENT_END) and len(chunk) <= self._bytes_max:
            whole = chunk.rfind(_EVENT_END) + len(_EVENT_END)
            if whole < len(_EVENT_END):
                self._held = chunk
                return True
            chunk, self._held = chunk[:whole], chunk[whole:]
        if not self._begun:
            if chunk.startswith(b":"):
                comments, chunk = _split_comments(chunk)
                self._comments += comments
                if not chunk:
                    return self._show_comments()
            self._begin()
            chunk, self._comments = self._comments + chunk, b""
        if ERROR_EVENT in chunk:
            chunk = events_in_our_form(chunk)
            self._error = self._error or error_code(chunk[chunk.index(ERROR_EVENT) + len(_DATA) :])
        self._count += chunk.count(_EVENT_END)
        self._before, self._last = self._last, chunk
        if self._hides_usage:
            chunk = without_usage(chunk)
        return self._transaction.write(chunk)

    def end(self) -> None:
        """The replica's answer is complete."""
        if not self._begun:
            self._begin()
        self._transaction.finish(self._comments + self._held)

    def tell(self, record: RequestRecord) -> None:
        """Say what came, be it all or not."""
        record.error = self._error
        record.ends_with(self._before + self._last)
        if self._begun:
            # A chat's first event has a role alone.
            without_tokens = self._last.endswith(_LAST_EVENT) + (record.endpoint == "chat") + (self._error != "")
            record.events = max(0, self._count - without_tokens)

    def _show_comments(self) -> bool:
        """Send the comments of a stream without an event yet, once they were held for long enough."""
        if time.monotonic() < self._came_at + COMMENTS_HELD_SECONDS:
            return True
        comments, self._comments = self._comments, b""
        return self._transaction.comment(self._head.status, self._head.lines, comments)

    def _begin(self) -> None:
        self._begun = True
        self._transaction.begin(self._head.status, self._head.lines, is_event_stream=True)


def _split_comments(chunk: bytes) -> tuple[bytes, bytes]:
    """The comments that whole events begin with, and what follows them."""
    start = 0
    while chunk.startswith(b":", start):
        end = chunk.find(_EVENT_END, start)
        if end < 0 or not all(line.startswith(b":") for line in chunk[start:end].split(b"\n")):
            break
        start = end + len(_EVENT_END)
    return chunk[:start], chunk[start:]


async def _collect(transaction: Transaction, response: EngineConnection, bytes_max: int) -> Answer | None:
    head = response.head
    parts: list[bytes] = []
    size = 0
    while part := await response.read():
        parts.append(part)
        size += len(part)
        if size > bytes_max:
            break
    else:
        return Answer(head.status, head.lines, b"".join(parts))
    transaction.begin(head.status, head.lines)
    transaction.write(b"".join(parts))
    del parts
    while part := await response.read():
        if not transaction.write(part):
            await transaction.drained()
    transaction.finish()
    return None
