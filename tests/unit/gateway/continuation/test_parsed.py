"""Chats that the engine parses, cut anywhere and made anew: the client gets one message, and each part of it once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.continuation.events import Diverged
from gateway.continuation.tape import Tape
from gateway.continuation.terms import Terms, terms_of

Json = dict[str, Any]
CALLS = [("weather", '{"city": "Köln"}'), ("time", "{}")]
ANSWER = {"reasoning": "They ask for two things. ", "content": "I look it up.", "calls": CALLS}
USAGE = {"prompt_tokens": 9, "completion_tokens": 30, "total_tokens": 39, "prompt_tokens_details": {"cached_tokens": 8}}


class Parsing:
    """An engine that streams one answer; `name` is part of the ids that it makes up, `sizes` of its pieces come in turn."""

    def __init__(self, name: str, sizes: Sequence[int], answer: Json = ANSWER) -> None:
        self._name, self._sizes, self._answer = name, list(sizes) or [3], answer

    def events(self) -> list[bytes]:
        deltas: list[Json] = [{"role": "assistant", "content": ""}]
        for field in ("reasoning", "content"):
            deltas += [{field: piece} for piece in self._pieces(self._answer[field])]
        for index, (function, arguments) in enumerate(self._answer["calls"]):
            call: Json = {"index": index, "id": f"call-{self._name}-{index}", "type": "function"}
            deltas.append({"tool_calls": [{**call, "function": {"name": function, "arguments": ""}}]})
            deltas += [
                {"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in self._pieces(arguments)
            ]
        found = [self._event(delta, None) for delta in deltas]
        found.append(self._event({}, "tool_calls"))
        return [*found, self._data({"choices": [], "usage": USAGE}), b"data: [DONE]\n\n"]

    def _pieces(self, text: str) -> list[str]:
        found, at = [], 0
        while at < len(text):
            size = self._sizes[len(found) % len(self._sizes)]
            found.append(text[at : at + size])
            at += size
        return found

    def _event(self, delta: Json, finish: str | None) -> bytes:
        return self._data({"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})

    def _data(self, event: Json) -> bytes:
        frame = {"id": "one-id", "object": "chat.completion.chunk", "created": ord(self._name[0]), "model": "m"}
        return b"data: " + json.dumps(frame | event, separators=(",", ":")).encode() + b"\n\n"


class Client:
    """Puts the message together as clients do."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.calls: dict[int, Json] = {}
        self.finish: list[str] = []
        self.usage: list[Json] = []
        self.created: set[int] = set()
        self.roles = 0
        self.done = False

    def take(self, chunk: bytes) -> None:
        for event in filter(None, chunk.split(b"\n\n")):
            if event == b"data: [DONE]":
                self.done = True
                continue
            found = json.loads(event.removeprefix(b"data: "))
            self.created.add(found["created"])
            self.usage += [found["usage"]] if not found["choices"] else []
            for choice in found["choices"]:
                self._merge(choice["delta"])
                self.finish += [choice["finish_reason"]] if choice["finish_reason"] else []

    def _merge(self, delta: Json) -> None:
        self.roles += "role" in delta
        for name in ("reasoning", "content"):
            self.texts[name] = self.texts.get(name, "") + delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            known = self.calls.setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
            known["id"] += call.get("id", "")
            known["name"] += call["function"].get("name", "")
            known["arguments"] += call["function"].get("arguments", "")


TERMS = terms_of("chat", {"temperature": 0, "messages": [], "tools": [{}], "stream_options": {"include_usage": True}}, {})


def client_of(first: Parsing, second: Parsing, at: int) -> Client:
    assert TERMS is not None
    tape, client = Tape(TERMS, keeps_prompt=False), Client()
    for event in first.events()[:at]:
        client.take(tape.take(event))
    if tape.is_finished:
        client.take(tape.ending(9, 8))
        return client
    replayed = tape.replayed(7)
    assert replayed is not None
    for event in second.events():
        client.take(replayed.take(event))
    return client


@given(at=st.integers(1, 200), ours=st.lists(st.integers(1, 9), max_size=4), theirs=st.lists(st.integers(1, 9), max_size=4))
@settings(max_examples=300, deadline=None)
@example(at=16, ours=[2, 7, 7], theirs=[])  # behind the end, before the usage
def test_wherever_it_is_cut_the_client_gets_one_message(at: int, ours: list[int], theirs: list[int]) -> None:
    first, second = Parsing("first", ours), Parsing("second", theirs)
    events = first.events()
    at = min(at, len(events) - 1)
    client = client_of(first, second, at)
    assert client.texts == {"reasoning": ANSWER["reasoning"], "content": ANSWER["content"]}
    assert [(call["name"], call["arguments"]) for call in client.calls.values()] == CALLS
    begun = [f"call-first-{index}".encode() in b"".join(events[:at]) for index in range(len(CALLS))]
    assert [call["id"] for call in client.calls.values()] == [
        f"call-{'first' if was else 'second'}-{index}" for index, was in enumerate(begun)
    ]
    assert (client.finish, client.roles, client.created, client.done) == (["tool_calls"], 1, {ord("f")}, True)
    assert [usage["completion_tokens"] for usage in client.usage] == [30]


@pytest.mark.parametrize(
    "other",
    [
        {**ANSWER, "content": "I do not know."},
        {**ANSWER, "reasoning": "They ask"},
        {**ANSWER, "calls": [("weather", '{"city": "Bonn"}')]},
        {**ANSWER, "calls": [("whether", CALLS[0][1])]},
        {**ANSWER, "calls": []},
    ],
    ids=["text", "earlier_end_of_text", "arguments", "name", "no_call"],
)
def test_another_answer_is_found_out(other: Json) -> None:
    first = Parsing("first", [4])
    whole = len(first.events())
    with pytest.raises(Diverged):
        client_of(first, Parsing("second", [3], other), whole - 6)


def test_ids_of_tokens_are_not_given_with_a_part_of_an_event() -> None:
    body = {"temperature": 0, "messages": [], "tools": [{}]}
    assert terms_of("chat", body | {"return_token_ids": True}, {}) is None
    assert terms_of("chat", body | {"tools": [], "return_token_ids": True}, {}) is not None


def test_what_is_no_chat_of_a_form_that_is_known_is_not_continued() -> None:
    assert TERMS is not None
    for event in (b'data: {"id":"i","choices":[{"delta":{"tool_calls":[{}]}}]}\n\n', b"data: {no json}\n\n"):
        tape = Tape(TERMS, keeps_prompt=False)
        tape.take(event)
        assert tape.replayed(None) is None
    assert Tape(Terms(parsed=True), keeps_prompt=False).replayed(None) is None
