"""Event streams that hold more than tokens: keep-alive comments, and errors of the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.http_server.transaction import Transaction
from gateway.relay import answer
from gateway.relay.answer import _Events
from gateway.upstream.answer_head import AnswerHead
from tests.unit.gateway.running_door import Door, running_door

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 3, "stream": True}
COMMENT = ": keep-alive"


def first_bytes(door: Door) -> int:
    """First bytes that the relay told of."""
    return sum(what == "first byte" for what, *_ in door.recorder.events)


async def streamed(door: Door, **fake: Any) -> tuple[list[str], Any]:
    """The lines of a streamed completion that are not empty, and its headers."""
    async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"fake": fake}) as got:
        assert got.status == 200
        return [line for line in (await got.text()).splitlines() if line], got.headers


async def test_comments_are_not_the_first_token_and_take_no_header(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        lines, headers = await streamed(door, comments=3, token_delay=0.01)
    assert lines[:3] == [COMMENT] * 3
    assert lines[-1] == "data: [DONE]"
    assert headers["x-peerkv-cache"] == door.recorder.header.decode()
    assert headers["x-peerkv-replica"] == "replica-0"
    assert first_bytes(door) == 1


@pytest.mark.parametrize("held_seconds", [15.0, 0.0])
async def test_a_replica_that_dies_behind_its_comments_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_seconds: float
) -> None:
    monkeypatch.setattr(answer, "COMMENTS_HELD_SECONDS", held_seconds)
    async with running_door(tmp_path) as door:
        for name in ("replica-0", "replica-1"):
            await door.add_engine(name)
        door.recorder.borne = True
        lines, headers = await streamed(door, on="replica-0", comments=2, token_delay=0.01, drop="mid", after=0)
        assert door.relay.counters.retries == 1
    assert json.loads(lines[-2].removeprefix("data: "))["system_fingerprint"] == "replica-1"
    assert lines[-1] == "data: [DONE]"
    assert first_bytes(door) == 1
    assert ("x-peerkv-cache" in headers) == (held_seconds > 0)
    assert (COMMENT in lines) == (held_seconds == 0)  # shown at once, or gone with the replica


async def test_comments_of_a_long_wait_reach_the_client_before_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "COMMENTS_HELD_SECONDS", 0.0)
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        body = COMPLETION | {"fake": {"comments": 1, "token_delay": 0.05}}
        async with door.session.post(door.url + "/v1/completions", json=body) as got:
            assert await got.content.readline() == COMMENT.encode() + b"\n"
            assert first_bytes(door) == 0
            assert (await got.text()).endswith("data: [DONE]\n\n")
        assert first_bytes(door) == 1


async def test_an_error_behind_comments_ends_the_stream_as_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "COMMENTS_HELD_SECONDS", 0.0)
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        lines, _ = await streamed(door, comments=2, token_delay=0.01, drop="mid", after=0)
    assert lines[:2] == [COMMENT] * 2
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"


async def test_an_answer_that_is_no_stream_follows_comments_as_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "COMMENTS_HELD_SECONDS", 0.0)
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        engine = await door.add_engine("replica-1")
        engine.context_tokens = 1  # so that it refuses what the other one has taken
        door.recorder.borne = True
        lines, _ = await streamed(door, on="replica-0", comments=1, token_delay=0.01, drop="mid", after=0)
    assert lines[0] == COMMENT
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "invalid_request_error"


async def test_an_error_event_of_the_engine_has_openais_form(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        await door.add_engine("replica-0")
        lines, _ = await streamed(door, stream_error=1)
    error = json.loads(lines[1].removeprefix("data: "))["error"]
    assert error == {"message": "the engine failed", "type": "internal_error", "param": None, "code": None}
    assert lines[2:] == ["data: [DONE]"]


class Client:
    """The client's end of a transaction."""

    def __init__(self) -> None:
        self.got = b""

    def begin(self, status: int, lines: bytes, *, is_event_stream: bool) -> None:
        self.got += b"<begun>"

    def write(self, chunk: bytes) -> bool:
        self.got += chunk
        return True

    def finish(self, last: bytes) -> None:
        self.got += last


@pytest.mark.parametrize("cut", range(1, 60))
def test_comments_and_events_pass_in_order_however_they_are_cut(cut: int) -> None:
    stream = b": a\n: b\n\n: c\n\n: not alone\ndata: 1\n\n: d\n\ndata: 2\n\ndata: [DONE]\n\n"
    client = Client()
    as_transaction: Transaction = client  # type: ignore[assignment]
    events = _Events(as_transaction, AnswerHead(200, []), 1000)
    for start in range(0, len(stream), cut):
        events.take(stream[start : start + cut])
    events.end()
    assert client.got.replace(b"<begun>", b"") == stream
    assert client.got.startswith(b"<begun>: a")


def test_a_stream_of_comments_alone_passes() -> None:
    client = Client()
    events = _Events(client, AnswerHead(200, []), 1000)  # type: ignore[arg-type]
    events.take(b": a\n\n")
    events.end()
    assert client.got == b"<begun>: a\n\n"
