"""What a stream has sent so far, kept so that another engine can go on from there.

While the stream runs, its events are put aside as they come: they are read some at a time, or when the engine died.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import msgspec

from gateway.continuation.events import (
    DATA,
    DONE,
    EMPTY,
    EVENT_END,
    decode,
    events_in,
    without_empty,
    without_ids,
    without_prompt_ids,
)
from gateway.continuation.parsed import Replayed, Sent
from gateway.continuation.rest import decode_event
from gateway.continuation.terms import Terms

CHUNKS_HELD = 256
"""Read together, some 80 KB: most answers end before that, and of those that do not the code is in the processor's caches."""


class Cut(msgspec.Struct, frozen=True):
    """Where another engine goes on, after `kept` tokens of the output, which it gets as part of its prompt.

    Of what it makes the client has `again` already, and `characters` of text. `id` and `created` are the stream's.
    """

    kept: Sequence[int]
    again: Sequence[int]
    characters: int
    id: str
    created: int
    usage_sent: bool = False


class Tape:
    """One stream's. `keeps_prompt`: the engine's ids of the prompt are not known otherwise."""

    def __init__(self, terms: Terms, *, keeps_prompt: bool) -> None:
        self.terms = terms
        self._finished = False
        self._usage_sent = False
        self._done = False
        self.prompt = b""
        """The prompt's ids in decimals, with commas between them, if they are kept."""
        self._keeps_prompt = keeps_prompt
        self._chunks: list[bytes] = []
        self._begun = False
        self._unreadable = False
        self._id, self._object, self._model, self._created = "", "", "", 0
        self._ids = array("i")
        # By event: the tokens and the characters sent until then, and whether it had one token alone.
        self._ends, self._characters = array("I"), array("I")
        self._sent = Sent() if terms.parsed else None

    def take(self, chunk: bytes) -> bytes:
        """Put events of the stream, whole ones, aside; returns them as the client gets them."""
        if not self._begun:
            return self._first(chunk)
        chunks = self._chunks
        chunks.append(chunk)
        if len(chunks) >= CHUNKS_HELD:
            self._read()
        if self.terms.wants_ids or self.terms.parsed:
            return chunk
        return without_ids(without_empty(chunk) if self.terms.chat and EMPTY in chunk else chunk)

    def _first(self, chunk: bytes) -> bytes:
        self._begun = True
        if self.terms.parsed:
            self._chunks.append(chunk)
            return chunk
        stripped, prompt = without_prompt_ids(chunk)
        if self._keeps_prompt:
            self.prompt = prompt
        self._chunks.append(stripped)
        return chunk if self.terms.wants_ids else without_ids(stripped)

    def spoil(self) -> None:
        """The client got something that is not whole events: the stream cannot be continued."""
        self._unreadable = True

    @property
    def is_finished(self) -> bool:
        """Whether the client was told why the answer ends, and `ending` knows the rest."""
        self._read()
        lacks_usage = self.terms.parsed and self.terms.wants_usage and not self._usage_sent  # its tokens are not counted here
        return self._finished and not self._unreadable and not lacks_usage

    def cut(self, is_whole: Callable[[Sequence[int]], bool], *, from_start: bool = False) -> Cut | None:
        """Where to go on; `from_start`: with nothing but the prompt. None if the events could not be read, or none came.

        `is_whole` tells whether text ends with the last of some ids, rather than within a character.
        """
        self._read()
        if self._unreadable or not self._id:
            return None
        place, text = (-1, 0) if from_start else self._place(is_whole)
        kept = self._ends[place] if place >= 0 else 0
        sent = self._characters[-1] if self._characters else 0
        return Cut(
            kept=self._ids[:kept],
            again=self._ids[kept:],
            characters=sent - text,
            id=self._id,
            created=self._created,
            usage_sent=self._usage_sent,
        )

    def replayed(self, cached_tokens: int | None) -> Replayed | None:
        """What makes the rest of the stream of an answer that is made anew; None if the events could not be read."""
        self._read()
        if self._sent is None or self._unreadable or not self._id:
            return None
        return Replayed(
            *(self._sent, self._id, self._created),
            end_sent=self._finished,
            usage_sent=self._usage_sent,
            cached_tokens=cached_tokens,
        )

    def _place(self, is_whole: Callable[[Sequence[int]], bool]) -> tuple[int, int]:
        """Return the last event behind which another engine can go on, and the characters of the text until there; -1 and 0
        for the prompt's end.

        Its detokenizer must not begin within a character, and it has to see the whole of a stop string that is still to end. An
        event with new text and one token ends with a whole character; one that brought none may have half of one, or none at
        all, such as that of the token that ends the answer: it is made again.
        """
        terms, ends, characters = self.terms, self._ends, self._characters
        if not ends or (terms.held and not characters[-1]):
            return -1, 0
        text_max = characters[-1] + terms.held - terms.lookback
        tokens_max = len(self._ids) if terms.max_tokens is None else terms.max_tokens - 1
        for place in range(len(ends) - 1, -1, -1):
            before, text_before = (ends[place - 1], characters[place - 1]) if place else (0, 0)
            tokens, text = ends[place], characters[place]
            if text <= text_before or tokens <= before or tokens > tokens_max or text + terms.held > text_max:
                continue
            if tokens - before == 1 or is_whole(self._ids[:tokens]):
                return place, text + terms.held
        return -1, 0

    def ending(self, prompt_tokens: int, cached_tokens: int) -> bytes:
        """What is still due of a stream whose last token was sent: the usage, if somebody asked for it, and the end."""
        if self._done:
            return b""
        due = b""
        if self.terms.wants_usage and not self._usage_sent:
            tokens = len(self._ids)
            usage = {
                "prompt_tokens": prompt_tokens,
                "total_tokens": prompt_tokens + tokens,
                "completion_tokens": tokens,
                "prompt_tokens_details": {"cached_tokens": cached_tokens},
            }
            event = {"id": self._id, "object": self._object, "created": self._created, "model": self._model}
            due = DATA + msgspec.json.encode({**event, "choices": [], "usage": usage}) + EVENT_END
        return due + DONE + EVENT_END

    def _read(self) -> None:
        chunks, self._chunks = self._chunks, []
        try:
            for chunk in chunks:
                for event in events_in(chunk):
                    self._read_event(event)
        except (msgspec.MsgspecError, UnicodeDecodeError, OverflowError):
            self._unreadable = True

    def _read_event(self, event: bytes) -> None:
        if event == DONE:
            self._done = True
            return
        found = decode(event[len(DATA) :])
        if not self._id:
            self._id, self._object, self._model, self._created = found.id, found.object, found.model, found.created
        if found.usage is not None and not found.choices:
            self._usage_sent = True
        if self._sent is not None:
            self._read_deltas(self._sent, event)
            return
        for choice in found.choices:
            text = choice.text if choice.delta is None else choice.delta.content or ""
            ids = choice.token_ids
            if choice.delta is not None and (choice.delta.tool_calls or choice.delta.reasoning):
                self._unreadable = True
            if ids is None and (text or choice.finish_reason):
                self._unreadable = True  # the engine did not tell which tokens these are
            self._ids.extend(ids or ())
            self._ends.append(len(self._ids))
            self._characters.append((self._characters[-1] if self._characters else 0) + len(text))
            self._finished = self._finished or choice.finish_reason is not None

    def _read_deltas(self, sent: Sent, event: bytes) -> None:
        """Of a chat that the engine parses."""
        try:
            for choice in decode_event(event[len(DATA) :]).get("choices") or ():
                sent.add(choice["delta"])
                self._finished = self._finished or choice.get("finish_reason") is not None
        except (TypeError, KeyError, AttributeError):
            self._unreadable = True
