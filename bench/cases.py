"""The six cases and the requests they consist of."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec

MODEL = "bench-model"
EVENTS = 32
"""Events of a streamed answer before its [DONE]."""
DOCUMENTS = 8
_WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not", "which")

Prompts = Literal["tail", "same", "fresh"]
Endpoint = Literal["completions", "chat"]
PATHS: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True)
class Case:
    """`connections` clients, each sending one request after another; `characters` is the approximate prompt length."""

    name: str
    characters: int
    connections: int
    stream: bool = False


CASES = (
    Case("small-1", 200, 1),
    Case("small-32", 200, 32),
    Case("stream-1", 200, 1, stream=True),
    Case("stream-32", 200, 32, stream=True),
    Case("16KB-32", 16 << 10, 32),
    Case("220KB-32", 220 << 10, 32),
)


def documents(characters: int) -> list[str]:
    """Return DOCUMENTS texts of English words, always the same ones."""
    source = random.Random(characters)
    texts = []
    for number in range(DOCUMENTS):
        words = [f"Document {number}."]
        size = 0
        while size < characters:
            word = source.choice(_WORDS)
            size += len(word) + 1
            words.append(word)
        texts.append(" ".join(words)[:characters])
    return texts


def bodies(case: Case, prompts: Prompts, endpoint: Endpoint, seed: int) -> Iterator[bytes]:
    """Yield JSON bodies without end.

    "tail": one of DOCUMENTS, then a question never asked before. "same": one of DOCUMENTS. "fresh": nothing in common with any
    earlier prompt.
    """
    frames = [_frame(text, case.stream, endpoint) for text in documents(case.characters)]
    number = seed
    while True:
        head, tail = frames[number % DOCUMENTS]
        if prompts == "tail":
            yield b"%s Question: %s?%s" % (head, _question(number), tail)
        elif prompts == "same":
            yield head + tail
        else:
            opening = head.index(b"Document")
            yield b"%s%016x %s%s" % (head[:opening], number, head[opening:], tail)
        number += 1


def _question(number: int) -> bytes:
    """Return eight words that are unique to this number below 18 ** 8."""
    number = number * 0x9E3779B1 % len(_WORDS) ** 8
    words = []
    for _ in range(8):
        number, place = divmod(number, len(_WORDS))
        words.append(_WORDS[place])
    return " ".join(words).encode()


def _frame(text: str, stream: bool, endpoint: Endpoint) -> tuple[bytes, bytes]:
    """Return the parts of a body before and after the question."""
    mark = "@question@"
    prompt = text + mark
    asked = {"prompt": prompt} if endpoint == "completions" else {"messages": [{"role": "user", "content": prompt}]}
    body = {"model": MODEL, **asked, "max_tokens": EVENTS, "temperature": 0.0, "stream": stream}
    head, _, tail = msgspec.json.encode(body).partition(mark.encode())
    return head, tail
