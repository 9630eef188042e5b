"""A stream that is cut anywhere and continued by another engine is, to the client, the stream of one that lives."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.continuation.events import Diverged
from gateway.continuation.resumed import Resumed
from gateway.continuation.tape import CHUNKS_HELD, Tape
from gateway.continuation.terms import Terms, terms_of
from tests.unit.gateway.continuation.simulated_engine import END, Engine, Request, ends_whole, ids_of

PROMPT = ids_of("Say it: ")
TEXTS = st.text(alphabet="ab €🙂é", min_size=1, max_size=24)


@dataclass
class Seen:
    """What a client makes of a stream."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: list[str] = field(default_factory=list)
    stop: str | None = None
    usage: list[dict[str, Any]] = field(default_factory=list)
    created: set[int] = field(default_factory=set)
    roles: int = 0
    done: bool = False

    def take(self, chunk: bytes) -> None:
        for event in chunk.split(b"\n\n"):
            if event == b"data: [DONE]":
                self.done = True
            elif event:
                self._take(json.loads(event.removeprefix(b"data: ")))

    def _take(self, found: dict[str, Any]) -> None:
        self.created.add(found["created"])
        if not found["choices"]:
            self.usage.append(found["usage"])
        for choice in found["choices"]:
            delta = choice.get("delta", {})
            self.roles += "role" in delta
            self.text += choice.get("text", "") + delta.get("content", "")
            self.ids += choice.get("token_ids") or []
            self.finish += [choice["finish_reason"]] if choice["finish_reason"] else []
            self.stop = choice.get("stop_reason") or self.stop


def never(ids: Any) -> bool:
    return False


def by_decoding(ids: Any) -> bool:
    return ends_whole(list(ids))


def terms(request: Request, *, wants_ids: bool = True) -> Terms:
    body: dict[str, Any] = {"temperature": 0, "max_tokens": request.max_tokens, "min_tokens": request.min_tokens}
    body |= {"stop": list(request.stop), "include_stop_str_in_output": request.include_stop, "return_token_ids": wants_ids}
    body |= {"stream_options": {"include_usage": request.usage}}
    found = terms_of("chat" if request.chat else "completions", body, {})
    assert found is not None
    return found


def whole(engine: Engine, request: Request, together: list[int], *, wants_ids: bool) -> Seen:
    tape, seen = Tape(terms(request, wants_ids=wants_ids), keeps_prompt=False), Seen()
    for event in engine.events(request, together):
        seen.take(tape.take(event))
    return seen


def cut(
    first: Engine,
    second: Engine,
    request: Request,
    at: int,
    together: list[int],
    *,
    wants_ids: bool = True,
    is_whole: Callable[[Any], bool] = never,
) -> tuple[Seen, int]:
    """What the client sees if the first engine dies behind so many events, and how many tokens the second one got."""
    tape, seen = Tape(terms(request, wants_ids=wants_ids), keeps_prompt=True), Seen()
    for event in first.events(request, together)[:at]:
        seen.take(tape.take(event))
    assert [int(each) for each in tape.prompt.split(b",")] == request.prompt
    if tape.is_finished:
        seen.take(tape.ending(len(request.prompt), len(request.prompt) - 1))
        return seen, 0
    found = tape.cut(is_whole)
    assert found is not None
    kept = list(found.kept)
    rest = replace(
        request,
        prompt=request.prompt + kept,
        max_tokens=request.max_tokens - len(kept),
        min_tokens=max(0, request.min_tokens - len(kept)),
    )
    assert rest.max_tokens > 0
    resumed = Resumed(found, tape.terms, len(request.prompt), len(request.prompt) - 1)
    for event in second.events(rest):
        seen.take(resumed.take(event))
    return seen, len(kept)


@given(
    text=TEXTS,
    stops=st.lists(st.text(alphabet="ab €🙂", min_size=1, max_size=5), max_size=2),
    include_stop=st.booleans(),
    ends=st.booleans(),
    max_tokens=st.integers(1, 60),
    min_tokens=st.integers(0, 10),
    at=st.integers(1, 60),
    together=st.lists(st.integers(1, 4), max_size=8),
    chat=st.booleans(),
    wants_ids=st.booleans(),
    decodes=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_wherever_it_is_cut_the_client_cannot_tell(
    text: str,
    stops: list[str],
    include_stop: bool,
    ends: bool,
    max_tokens: int,
    min_tokens: int,
    at: int,
    together: list[int],
    chat: bool,
    wants_ids: bool,
    decodes: bool,
) -> None:
    script = ids_of(text * 3)
    script = [*script, END] if ends else script
    max_tokens = min(max_tokens, len(script))
    request = Request(PROMPT, max_tokens, min(min_tokens, max_tokens), stops, include_stop, chat=chat)
    first, second = Engine(PROMPT, script, 1), Engine(PROMPT, script, 2)
    expected = whole(first, request, together, wants_ids=wants_ids)
    events = first.events(request, together)
    is_whole = by_decoding if decodes else never
    seen, _ = cut(first, second, request, min(at, len(events) - 1), together, wants_ids=wants_ids, is_whole=is_whole)
    assert seen == expected
    assert (seen.done, seen.created, len(seen.finish), len(seen.usage)) == (True, {1}, 1, 1)


def case(text: str, **more: Any) -> tuple[Engine, Engine, Request]:
    script = [*ids_of(text), END]
    return Engine(PROMPT, script, 1), Engine(PROMPT, script, 2), Request(PROMPT, more.pop("max_tokens", 99), **more)


@pytest.mark.parametrize(("at", "kept"), [(1, 1), (2, 1), (3, 1), (4, 4), (5, 5)])
def test_a_cut_within_a_character_goes_on_before_it(at: int, kept: int) -> None:
    first, second, request = case("a€bc")
    seen, behind = cut(first, second, request, at, [])
    assert (seen.text, behind) == ("a€bc", kept)


def test_events_of_several_tokens_are_cut_behind_a_character_if_it_is_known_to_be_whole() -> None:
    first, second, request = case("a€bc€d")
    for at, kept in ((1, 0), (2, 6), (3, 6), (4, 10)):  # "a" and a third of "€"; "bc"; "€" but for its end; "d"
        seen, behind = cut(first, second, request, at, [2, 4, 2, 2], is_whole=by_decoding)
        assert (seen.text, behind) == ("a€bc€d", kept)


def test_a_stop_string_of_which_a_half_was_sent_still_stops() -> None:
    first, second, request = case("one two three", stop=["wo th"], include_stop=True)
    seen, behind = cut(first, second, request, 7, [])  # "one two" was sent
    assert (seen.text, seen.finish, seen.stop, behind) == ("one two th", ["stop"], "wo th", 3)


def test_a_stop_string_of_which_a_half_was_kept_back_still_stops() -> None:
    first, second, request = case("one two three four", stop=["ee fo"])
    seen, behind = cut(first, second, request, 13, [])  # "one two t" was sent
    assert (seen.text, seen.finish, behind) == ("one two thr", ["stop"], 9)
    seen, behind = cut(first, second, request, 5, [])  # "o" was sent
    assert (seen.text, seen.finish, behind) == ("one two thr", ["stop"], 0)


def test_what_is_kept_back_for_a_stop_string_that_never_comes_is_sent() -> None:
    first, second, request = case("one two three", stop=["never"])
    for at in range(1, 14):
        assert cut(first, second, request, at, [])[0].text == "one two three"


def test_the_bounds_of_the_answer_are_those_of_both_parts_together() -> None:
    first, second, request = case("0123456789", max_tokens=6)
    for at in range(1, 6):
        seen, behind = cut(first, second, request, at, [])
        assert (seen.text, seen.finish, behind) == ("012345", ["length"], at)
        assert (seen.usage[0]["prompt_tokens"], seen.usage[0]["completion_tokens"]) == (len(PROMPT), 6)


def test_the_last_token_may_have_come_without_a_reason_to_end() -> None:
    """No engine sends that; if one did, its last token is made again, and the other engine says why it ends."""
    tape = Tape(Terms(max_tokens=3), keeps_prompt=True)
    event = b'data: {"id":"i","object":"o","created":1,"model":"m","choices":[{"index":0,"text":"%b","token_ids":[%d]}]}\n\n'
    for text, token in ((b"a", 1), (b"b", 2), (b"c", 3)):
        tape.take(event % (text, token))
    found = tape.cut(never)
    assert found is not None
    assert (list(found.kept), list(found.again), found.characters) == ([1, 2], [3], 1)


def test_the_token_that_ends_an_answer_is_made_again_if_nobody_said_that_it_ended() -> None:
    tape = Tape(Terms(max_tokens=9), keeps_prompt=True)
    event = b'data: {"id":"i","object":"o","created":1,"model":"m","choices":[{"index":0,"text":"%b","token_ids":[%d]}]}\n\n'
    tape.take(event % (b"a", 1))
    tape.take(event % (b"", END))
    found = tape.cut(never)
    assert found is not None
    assert (list(found.kept), list(found.again)) == ([1], [END])


def test_no_stop_is_looked_for_before_min_tokens() -> None:
    first, second, request = case("ab ab ab ab", stop=["ab"], min_tokens=6)
    expected = whole(first, request, [], wants_ids=True)
    for at in range(1, 8):
        assert cut(first, second, request, at, [])[0] == expected


def test_an_engine_that_makes_another_token_is_found_out() -> None:
    first, _, request = case("a€bc")
    other = Engine(PROMPT, [*ids_of("a🙂c"), END], 2)
    with pytest.raises(Diverged):
        cut(first, other, request, 3, [])


def test_a_long_stream_is_read_as_it_goes() -> None:
    text = "0123456789" * 60
    first, second, request = case(text, max_tokens=1000)
    assert len(text) > 2 * CHUNKS_HELD
    seen, behind = cut(first, second, request, 590, [])
    assert (seen.text, behind) == (text, 590)


def test_a_stream_that_cannot_be_read_is_not_continued() -> None:
    tape = Tape(Terms(), keeps_prompt=True)
    tape.take(b"data: {not json}\n\n")
    assert tape.cut(never) is None
    tape = Tape(Terms(), keeps_prompt=True)
    first, _, request = case("abc")
    tape.take(first.events(request)[0])
    tape.spoil()
    assert tape.cut(never) is None


def test_an_engine_that_does_not_tell_ids_is_not_continued() -> None:
    tape = Tape(Terms(), keeps_prompt=True)
    tape.take(b'data: {"id":"i","object":"o","created":1,"model":"m","choices":[{"index":0,"text":"a","token_ids":null}]}\n\n')
    assert tape.cut(never) is None


def test_ids_are_kept_as_numbers() -> None:
    first, _, request = case("abc")
    tape = Tape(terms(request), keeps_prompt=False)
    for event in first.events(request)[:3]:
        tape.take(event)
    found = tape.cut(never)
    assert found is not None
    assert isinstance(found.kept, array)
    assert tape.prompt == b""


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, 16),
        ({"max_tokens": 5}, 5),
        ({"max_tokens": None}, 77),
    ],
)
def test_the_bound_of_a_completion_is_vllms(more: dict[str, Any], expected: int) -> None:
    found = terms_of("completions", {"temperature": 0, **more}, {}, lambda: 77)
    assert found is not None
    assert found.max_tokens == expected


def test_the_bound_of_a_chat_may_be_the_models_or_that_of_its_key() -> None:
    body = {"temperature": 0, "messages": []}
    assert terms_of("chat", body, {}, lambda: False) is None
    known = terms_of("chat", body, {"max_completion_tokens": 9}, lambda: False)
    assert known is not None
    assert known.max_tokens == 9
