"""vLLM's events of a stream, as far as going on with it needs them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

EVENT_END = b"\n\n"
DATA = b"data: "
DONE = b"data: [DONE]"
EMPTY = b'"delta":{},"logprobs":null,"finish_reason":null'
_IDS = b'"token_ids":['
_NO_IDS = b'"token_ids":null'
_PROMPT_IDS = b'"prompt_token_ids":['
_NO_PROMPT_IDS = b'"prompt_token_ids":null'
# Within a string the quotes would be escaped, so these are fields and not what a model said.


class Diverged(Exception):
    """The other engine does not make what the client has: going on would be a mixture of two answers."""


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class Choice(msgspec.Struct):
    """A completion's `text`, or a chat's `delta`."""

    text: str = ""
    delta: Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None


class Event(msgspec.Struct):
    id: str = ""
    object: str = ""
    created: int = 0
    model: str = ""
    choices: list[Choice] = []
    usage: dict[str, msgspec.Raw] | None = None
    prompt_token_ids: list[int] | None = None


decode = msgspec.json.Decoder(Event).decode


def without_ids(chunk: bytes) -> bytes:
    """Whole events as they are when nobody asks for the ids of tokens."""
    at = chunk.rfind(_IDS)
    while at >= 0:
        chunk = chunk[:at] + _NO_IDS + chunk[chunk.index(b"]", at) + 1 :]
        at = chunk.rfind(_IDS, 0, at)
    return chunk


def without_prompt_ids(chunk: bytes) -> tuple[bytes, bytes]:
    """Whole events without the ids of the prompt, and these ids in decimals with commas between them, b"" for none."""
    start = chunk.find(_PROMPT_IDS)
    if start < 0:
        return chunk, b""
    end = chunk.index(b"]", start)
    return chunk[:start] + _NO_PROMPT_IDS + chunk[end + 1 :], chunk[start + len(_PROMPT_IDS) : end]


def without_empty(chunk: bytes) -> bytes:
    """Whole events of a chat without those that are sent for the ids of their tokens alone."""
    return EVENT_END.join([event for event in chunk.split(EVENT_END) if EMPTY not in event])


def events_in(chunk: bytes) -> Iterator[bytes]:
    """Each event of a chunk of whole ones, without its end; comments are left out."""
    for event in chunk.split(EVENT_END):
        if event.startswith(DATA):
            yield event
