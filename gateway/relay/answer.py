"""A replica's answer on its way to the client, byte for byte but for errors, which get OpenAI's form."""

from __future__ import annotations

import time

import msgspec

from gateway.api.engine_errors import ERROR_EVENT, error_code, events_in_our_form
from gateway.continuation.rest import RestOfStream
from gateway.continuation.tape import Tape
from gateway.http_server.transaction import Transaction
from gateway.relay.hidden_usage import UsageHider
from gateway.relay.request_record import RequestRecord
from gateway.upstream.answer_head import AnswerHead
from gateway.upstream.connection import ConnectionBroke, EngineConnection

COMMENTS_HELD_SECONDS = 15.0
"""Keep-alive comments are for proxies, which wait for 30 s or more. For so long they wait for the first event, since with
them the head leaves, and x-peerkv-cache is not known before that event."""
ENGINE_DIED = b"EngineCore encountered an issue"
"""vLLM's words to the requests that its engine held when it ended."""
ABORTED = b'"finish_reason":"abort"'
"""The end of a stream that vLLM gave up, as it does when it is stopped."""
_EVENT_END = b"\n\n"
_DATA = b"data: "
_LAST_EVENT = b"data: [DONE]\n\n"
_TOKENS = {"responses": b".delta\n", "messages": b"event: content_block_delta\n"}
"""What is in each event that has tokens, where others have none: text of a model has no line ends within JSON."""


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


def says_that_its_engine_died(answer: Answer | None) -> bool:
    """In the body of any other answer the words may be a prompt's, or a model's."""
    return answer is not None and answer.status == 500 and ENGINE_DIED in answer.body


async def pass_on(
    transaction: Transaction,
    response: EngineConnection,
    record: RequestRecord,
    *,
    bytes_max: int,
    hides_usage: bool = False,
    tape: Tape | None = None,
    resumed: RestOfStream | None = None,
) -> Answer | None:
    """The answer when it is whole and nothing of it was sent yet; None when it was streamed to the client.

    What a stream says of its tokens and of its failure is put into the `record`; the client does not get the usage if
    `hides_usage`. A stream that may be continued is put on its `tape`; `resumed` makes a replica's stream the rest of one that
    has begun.

    An answer of more than `bytes_max` bytes is streamed. Raises ConnectionBroke when the replica breaks off, and Diverged.
    """
    head = response.head
    if head.is_event_stream:
        events = _Events(transaction, head, bytes_max, record.endpoint, hides_usage=hides_usage)
        if tape is not None:
            events.go_on(tape, resumed, record.events)
        try:
            await response.pump(events.take, transaction.drained)
            events.end()
        except ConnectionBroke:
            events.release()
            raise
        finally:
            events.tell(record)
        return None
    return await _collect(transaction, response, bytes_max)


class _Events:
    """Passes an event stream on. Only whole events are sent, so that an error event can follow any of them."""

    def __init__(
        self,
        transaction: Transaction,
        head: AnswerHead,
        bytes_max: int,
        endpoint: str = "completions",
        *,
        hides_usage: bool = False,
    ) -> None:
        self._transaction, self._head, self._bytes_max = transaction, head, bytes_max
        self._hider = UsageHider() if hides_usage else None
        self._mark = _TOKENS.get(endpoint, _EVENT_END)
        self._one_line_events = endpoint in ("completions", "chat")
        self._held = self._comments = b""
        self._begun = False
        self._error = ""
        self._count = 0
        self._last = self._before = b""  # chunks: the counts of tokens are in the event before the last one
        self._came_at = time.monotonic()
        self._tape: Tape | None = None
        self._resumed: RestOfStream | None = None
        self._before_events = 0

    def go_on(self, tape: Tape, resumed: RestOfStream | None, events: int) -> None:
        """Put the stream on its tape, or send it as the rest of one that had so many `events`."""
        self._tape, self._resumed = tape, resumed
        if resumed is not None:
            self._before_events = events

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
            if self._one_line_events and _has_ended_already(chunk):
                raise ConnectionBroke("its engine ended")  # before the client got anything: another replica may answer
            self._begin()
            chunk, self._comments = self._comments + chunk, b""
        fails = ERROR_EVENT in chunk
        if self._tape is not None and (chunk := self._taped(self._tape, chunk, fails=fails)) == b"":
            return True
        if fails:
            if self._tape is None and self._one_line_events and ENGINE_DIED in chunk:
                self._pass_on_before(chunk)
            chunk = events_in_our_form(chunk)
            self._error = self._error or error_code(chunk[chunk.index(ERROR_EVENT) + len(_DATA) :])
        self._count += chunk.count(self._mark)
        self._before, self._last = self._last, chunk
        if self._hider is not None:
            chunk = self._hider.take(chunk)
        return self._transaction.write(chunk)

    def _pass_on_before(self, chunk: bytes) -> None:
        """Send what came before the engine's word that it ended. Raises ConnectionBroke, always."""
        whole = chunk[: chunk.find(ERROR_EVENT)]
        self._count += whole.count(self._mark)
        self._transaction.write(whole if self._hider is None else self._hider.take(whole))
        raise ConnectionBroke("its engine ended")

    def _taped(self, tape: Tape, chunk: bytes, *, fails: bool) -> bytes:
        """Whole events as the client gets them. Raises ConnectionBroke for those that say that the engine ended, Diverged."""
        end = chunk.rfind(ABORTED)  # faster than forwards, as the field comes last
        if end < 0 and fails and ENGINE_DIED in chunk:
            end = chunk.find(ERROR_EVENT)
        if end >= 0:
            whole = chunk.rfind(_EVENT_END, 0, end) + len(_EVENT_END)
            if whole >= len(_EVENT_END):
                self._send(tape, chunk[:whole])
            raise ConnectionBroke("its engine ended")
        if self._resumed is not None:
            return self._resumed.take(chunk)
        if not chunk.endswith(_EVENT_END):
            tape.spoil()
        return tape.take(chunk)

    def _send(self, tape: Tape, chunk: bytes) -> None:
        chunk = tape.take(chunk) if self._resumed is None else self._resumed.take(chunk)
        self._count += chunk.count(self._mark)
        self._transaction.write(chunk if self._hider is None else self._hider.take(chunk))

    def end(self) -> None:
        """The replica's answer is complete. Raises ConnectionBroke if it does not say so, where it could be continued."""
        if self._tape is not None and not self._last.endswith(_LAST_EVENT):
            raise ConnectionBroke("the stream ended early")
        if not self._begun:
            self._begin()
        last = b"" if self._hider is None else self._hider.end()
        self._transaction.finish(self._comments + last + self._held)

    def release(self) -> None:
        """Send what waits for events that will not come."""
        if self._hider is not None and self._begun:
            self._transaction.write(self._hider.end())

    def tell(self, record: RequestRecord) -> None:
        """Say what came, be it all or not."""
        record.error = self._error
        record.ends_with(self._before + self._last)
        if self._begun:
            without_tokens = 0
            if self._mark is _EVENT_END:
                # A chat's first event has a role alone, and is left out of the rest of one.
                role = record.endpoint == "chat" and self._resumed is None
                without_tokens = self._last.endswith(_LAST_EVENT) + role + (self._error != "")
            record.events = self._before_events + max(0, self._count - without_tokens)

    def _show_comments(self) -> bool:
        """Send the comments of a stream without an event yet, once they were held for long enough."""
        if time.monotonic() < self._came_at + COMMENTS_HELD_SECONDS:
            return True
        comments, self._comments = self._comments, b""
        if self._resumed is not None:  # its head is with the client already
            return self._transaction.write(comments)
        return self._transaction.comment(self._head.status, self._head.lines, comments)

    def _begin(self) -> None:
        self._begun = True
        if self._resumed is not None:
            if self._transaction.answering is not None:
                self._transaction.answering()
            return
        self._transaction.begin(self._head.status, self._head.lines, is_event_stream=True)


def _has_ended_already(chunk: bytes) -> bool:
    """Whether the first event is the engine's word that it ended, and nothing of the answer comes before."""
    first = chunk[: chunk.find(_EVENT_END)]
    return ABORTED in first or (first.startswith(ERROR_EVENT) and ENGINE_DIED in first)


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
