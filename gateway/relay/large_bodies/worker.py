"""`python -m gateway.relay.large_bodies.worker`: the process that reads large bodies, one behind the other.

It decodes them, renders chats and tokenises prompts with a tokenizer of its own, and ends when its standard input does. Frames
are those of `messages`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

import msgspec

from gateway.api.partial_decode import decode_partly
from gateway.errors import ApiError, InvalidRequest
from gateway.prompts.parity import KindVerdict, ParityVerdict
from gateway.prompts.prompt_reader import PromptReader
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.relay.large_bodies.messages import LENGTH_BYTES, Job, Reading, Refusal, Setup

NICENESS = 5
"""Senders of large bodies wait, so that senders of small ones need not."""
PLANNED_FIELDS = ("model", "stream", "prompt_cache_key", "previous_response_id")
"""What the planner looks at beside the prompt. Longer values than PLANNED_CHARS_MAX say nothing."""
PLANNED_CHARS_MAX = 4096
NUMBERS = ("n", "max_tokens", "max_completion_tokens", "max_output_tokens", "stream_interval")
"""What an answer may come to is reckoned from. Where one of them is no number of 64 bits, some text stands for it."""
NUMBER_MAX = 1 << 62

_encode = msgspec.msgpack.Encoder().encode


def main() -> None:
    """Answer jobs until there are no more."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    os.nice(NICENESS)
    sys.stdout = sys.stderr  # a library's output must not be taken for a frame
    setup = msgspec.msgpack.decode(_frame(source), type=Setup)
    tenants = 0
    services = [
        TokenService(TokenizerSource(**source), setup.cache_bytes_max, setup.texts_bytes_max, lambda: tenants)
        for source in setup.sources
    ]
    readers = [(tokens, PromptReader(tokens, 0, lambda: None)) for tokens in services]
    resource.setrlimit(resource.RLIMIT_DATA, (setup.memory_bytes_max, setup.memory_bytes_max))
    jobs = msgspec.msgpack.Decoder(Job)
    while frame := _frame(source):
        job = jobs.decode(frame)
        tenants = job.tenants
        answer, parts = _answer(readers, job, _exactly(source, job.size))
        content = _encode(answer)
        sink.writelines((len(content).to_bytes(LENGTH_BYTES, "little"), content, *parts))
        sink.flush()
        del answer, parts
        _give_memory_back()


def _answer(
    readers: Sequence[tuple[TokenService, PromptReader]], job: Job, raw: bytes
) -> tuple[Reading | Refusal, list[bytes]]:
    try:
        body, span = decode_partly(job.endpoint, raw)
        fleet = next((place for place, each in enumerate(job.fleets) if body.get("model") in each.names), 0)
        told, (tokens, reader) = job.fleets[fleet], readers[fleet]
        tokens.load()  # unless that was done
        reader.parity = ParityVerdict(KindVerdict(told.completions), KindVerdict(told.chat), context_tokens=told.context_tokens)
        known = reader.read_here(job.endpoint, body, job.tenant)
        fields = {name: body[name] for name in PLANNED_FIELDS if _is_short(body.get(name))}
        fields |= {name: _number(body[name]) for name in NUMBERS if body.get(name) is not None}
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True:
            fields["stream_options"] = {"include_usage": True}
        return Reading.of(fleet, fields, span, known)
    except ApiError as error:
        return _refusal(error), []
    except MemoryError:
        return _refusal(InvalidRequest("The body holds more values than are taken in.", status=413, code="body_too_large")), []


def _refusal(error: ApiError) -> Refusal:
    return Refusal(error.message, error.status, error.type, error.code, error.param, error.headers)


def _is_short(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and len(value) <= PLANNED_CHARS_MAX)


def _number(value: Any) -> int | str:
    return max(-1, min(value, NUMBER_MAX)) if type(value) is int else "no number"


def _frame(source: BinaryIO) -> bytes:
    """The next frame; empty at the end."""
    length = source.read(LENGTH_BYTES)
    return _exactly(source, int.from_bytes(length, "little")) if len(length) == LENGTH_BYTES else b""


def _exactly(source: BinaryIO, size: int) -> bytes:
    content = source.read(size)
    if len(content) < size:
        sys.exit(0)
    return content


def _give_memory_back() -> None:
    """Give memory back: a decoded body takes many times more than anything else here."""
    with contextlib.suppress(AttributeError, OSError):  # of glibc alone
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
