"""Large bodies are read in a process of their own, with the result that reading them here would have."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.api.endpoints import Endpoint
from gateway.errors import ApiError, PromptTooLong, Unavailable
from gateway.prompts.parity import KindVerdict, Parity
from gateway.prompts.prompt_reader import KnownPrompt, PromptReader
from gateway.prompts.tokenizer import encoder as encoders
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TextTooLong, TokenService
from gateway.relay.large_bodies import pool
from gateway.relay.large_bodies.messages import Job
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import no_keys
from gateway.token_ids import TokenIds
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.prompts.tiny_model import make_model
from tests.unit.gateway.prompts.tokenizer.tokenizer_kinds import tokenizer_of
from tests.unit.gateway.running_door import fake_fleet, running_door

EXACT = KindVerdict(Parity.EXACT)
CONTEXT_TOKENS = 4096


class Place:
    """A reader here, and one in another process."""

    def __init__(self, model: Path) -> None:
        source = TokenizerSource(str(model))
        self.tokens = TokenService(source)
        assert self.tokens.load().loaded
        self.here = PromptReader(self.tokens, 1 << 20, lambda: None)
        self.here.parity = replace(self.here.parity, completions=EXACT, chat=EXACT, context_tokens=CONTEXT_TOKENS)
        self.there = LargeBodies([(source, self.here)], workers=1, cache_bytes_max=1 << 20, texts_bytes_max=1 << 20)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.there._idle]

    async def read(self, endpoint: Endpoint, body: dict[str, Any]) -> Any:
        return await self.there.read(endpoint, json.dumps(body).encode(), "")


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(make_model(tmp_path / "model"))
    yield place
    await place.there.close()


def in_words(known: KnownPrompt) -> dict[str, Any]:
    """A known prompt as plain values."""
    values = {name: getattr(known, name) for name in KnownPrompt.__struct_fields__}
    for name in ("ids", "sent"):
        if isinstance(values[name], TokenIds):
            values[name] = values[name].tolist()
        elif values[name] is not None:
            values[name] = [ids.tolist() for ids in values[name]]
    return values


BODIES: list[tuple[Endpoint, dict[str, Any]]] = [
    ("completions", {"prompt": "hello there", "stream": True, "model": "m", "prompt_cache_key": "k", "unknown": [{}] * 1000}),
    ("completions", {"prompt": ["hello", "a longer one", "b"]}),
    ("completions", {"prompt": [1, 2, 3]}),
    ("completions", {"prompt": [[1, 2], [3, 4, 5]]}),
    ("completions", {"prompt": "hello there", "echo": True, "logprobs": 1}),
    ("completions", {"prompt": "hello there", "truncate_prompt_tokens": 2}),
    ("chat", {"messages": [{"role": "user", "content": "how are you?"}]}),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
    ("embeddings", {"input": "some text " * 20}),
    ("responses", {"input": "how are you?", "instructions": "be short"}),
    ("messages", {"messages": [{"role": "user", "content": "how are you?"}], "system": "be short", "max_tokens": 1}),
    ("rerank", {"query": "q", "documents": ["one", "two"]}),
]


async def test_what_is_known_of_a_large_body_is_what_would_be_known_here(place: Place) -> None:
    for endpoint, body in BODIES:
        found = await place.read(endpoint, body)
        assert in_words(found.known) == in_words(await place.here.read(endpoint, body)), body
        looked_at = ("model", "stream", "prompt_cache_key", "max_tokens")
        assert found.fields == {name: body[name] for name in looked_at if name in body}
    assert len(place.pids) == 1


async def test_of_several_models_the_one_that_is_named_reads_the_body(tmp_path: Path) -> None:
    places = [
        Place(make_model(tmp_path / "tiny")),
        Place(make_model(tmp_path / "llama", tokenizer=tokenizer_of("Llama 3"))),
    ]
    both = LargeBodies(
        [(TokenizerSource(str(tmp_path / name)), place.here) for name, place in zip(("tiny", "llama"), places, strict=True)],
        workers=1,
        cache_bytes_max=1 << 20,
        texts_bytes_max=1 << 20,
        names=lambda: [["tiny"], ["llama", "other"]],
    )
    try:
        for model, fleet in (("tiny", 0), ("llama", 1), ("other", 1), ("none", 0), ("tiny", 0)):
            body = {"prompt": "something that is said", "model": model}
            found = await both.read("completions", json.dumps(body).encode(), "")
            assert found.fleet == fleet
            assert in_words(found.known) == in_words(await places[fleet].here.read("completions", body))
        [process] = both._idle
        assert resource.prlimit(process.pid, resource.RLIMIT_DATA) == (4 << 30, 4 << 30)  # a tokenizer more than for one
    finally:
        await both.close()


async def test_a_body_that_was_read_for_another_model_is_not_served(place: Place, tmp_path: Path) -> None:
    async with running_door(tmp_path, place.there, body_inline_bytes_max=1024, models=("one", "fake-model")) as door:
        await door.add_engine("two-0", fleet=fake_fleet(door.fleets.all[1]))
        status, answer, _ = await door.post("/v1/completions", {"model": "fake-model", "prompt": "some words " * 150})
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert not (await door.seen("two-0"))["requests"]


async def test_a_clients_error_is_the_same_there(place: Place) -> None:
    for endpoint, body in [
        ("completions", {"prompt": "x", "cache_salt": "mine"}),
        ("completions", {"prompt": 7}),
        ("completions", {"prompt": "ab " * CONTEXT_TOKENS}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "x"}]}]}),
    ]:
        with pytest.raises(ApiError) as there:
            await place.read(endpoint, body)  # type: ignore[arg-type]
        assert 400 <= there.value.status < 500
        assert there.value.param in (*body, "prompt_embeds")
    with pytest.raises(ApiError) as too_long:
        await place.read("completions", {"prompt": "ab " * CONTEXT_TOKENS})
    assert too_long.value.code == PromptTooLong.code


async def test_a_process_that_dies_costs_the_body_that_it_read_and_no_other(place: Place) -> None:
    await place.read("completions", {"prompt": "x"})
    (process,) = place.there._idle
    process.kill()
    await process.wait()
    with pytest.raises(Unavailable):
        await place.read("completions", {"prompt": "x"})
    assert (await place.read("completions", {"prompt": "x"})).known.tokens > 0
    assert place.pids != [process.pid]


@pytest.mark.parametrize(
    "says", ["", "sys.stdout.buffer.write(b'\\x01' + bytes(7) + b'?')"], ids=["says nothing", "says what is no answer"]
)
async def test_a_process_that_is_of_no_use_is_ended_and_another_reads_on(
    place: Place, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    begun = []
    start = place.there._start

    async def noted() -> Any:
        begun.append(await start())
        return begun[-1]

    monkeypatch.setattr(place.there, "_start", noted)
    with monkeypatch.context() as broken:
        broken.setattr(pool, "READ_SECONDS_MAX", 1.0 if not says else 60.0)
        broken.setattr(pool, "_WORKER", ("-c", f"import sys, time; {says}; sys.stdout.flush(); time.sleep(600)"))
        with pytest.raises(Unavailable):
            await place.read("completions", {"prompt": "x"})
    async with asyncio.timeout(20):
        await begun[0].wait()
    assert (await place.read("completions", {"prompt": "x"})).known.tokens > 0


async def test_a_client_that_leaves_costs_no_process(place: Place) -> None:
    await place.read("completions", {"prompt": "x"})
    before = place.pids
    leaving = asyncio.create_task(place.read("completions", {"prompt": "x " * 100_000}))
    await asyncio.sleep(0)
    assert place.there._running
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    assert (await place.read("completions", {"prompt": "y"})).known.tokens > 0
    assert place.pids == before


@pytest.mark.parametrize("ids", [None, TokenIds.of([5, 6, 7])])
async def test_a_large_body_reaches_the_replica_as_a_small_one_does(place: Place, tmp_path: Path, ids: Any) -> None:
    async with running_door(tmp_path, place.there, body_inline_bytes_max=1024) as door:
        await door.add_engine("replica-0")
        door.planner.prompt = ids
        body = {"model": "fake-model", "prompt": "some words " * 150, "max_tokens": 1, "user": "somebody"}
        status, answer, _ = await door.post("/v1/completions", body)
        assert status == 200, answer
        (request,) = (await door.seen("replica-0"))["requests"]
        assert request["body"] == {
            **body,
            "prompt": body["prompt"] if ids is None else ids.tolist(),
            "kv_transfer_params": {"peerkv": {"source": "", "tag": "t"}},
        }
        status, answer, _ = await door.post("/v1/completions", {**body, "priority": 5})
        assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert len(place.pids) == 1


@pytest.mark.parametrize(
    ("asked", "status"),
    [({"n": 2}, 200), ({"n": 3}, 400), ({"n": [3]}, 400), ({"max_tokens": 10**30}, 400), ({"max_tokens": 9}, 200)],
)
async def test_what_a_key_may_ask_for_is_seen_in_a_large_body_too(
    place: Place, tmp_path: Path, asked: dict[str, Any], status: int
) -> None:
    keys = tmp_path / "keys.toml"
    write_keys(keys, no_keys().with_key(limited("a", n_max=2, max_tokens_max=10)))
    async with running_door(tmp_path, place.there, body_inline_bytes_max=1024, keys_file=keys) as door:
        await door.add_engine("replica-0")
        body = {"prompt": "some words " * 150, "max_tokens": 1, **asked}
        found, answer, _ = await door.post("/v1/completions", body, headers={"authorization": "Bearer a"})
        assert found == status, answer


def test_a_text_beyond_the_limit_is_tokenised_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = TokenService(TokenizerSource(str(make_model(tmp_path, tokenizer=tokenizer_of("Llama 3")))))
    assert service.load().loaded
    counted, encode_all = 0, encoders.encode_all

    def counting(tokenizer: Any, texts: list[str], special: bool) -> Any:
        nonlocal counted
        counted += sum(map(len, texts))
        return encode_all(tokenizer, texts, special)

    monkeypatch.setattr(encoders, "encode_all", counting)
    text = "\n".join(f"line {number} of a long text" for number in range(100_000))
    with pytest.raises(TextTooLong) as error:
        service.encode(text, tokens_max=len(text) // service._chars_per_token_max + 1)
    assert error.value.tokens_min > error.value.tokens_max
    assert counted < 2 * encoders.GROUP_CHARS < len(text) / 2


def test_a_long_text_has_the_same_ids_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = (
        make_model(tmp_path, tokenizer=tokenizer_of("Llama 3")),
        "\n".join(f"line {n} of a text" for n in range(5_000)),
    )
    whole, grouped = TokenService(TokenizerSource(str(model))), TokenService(TokenizerSource(str(model)))
    assert whole.load().loaded
    assert grouped.load().loaded
    expected = whole.encode(text).tolist()
    monkeypatch.setattr(encoders, "GROUP_CHARS", 10_000)
    for _ in range(4):  # then its pages are known
        assert grouped.encode(text).tolist() == expected


async def test_a_process_hears_with_each_body_how_many_tenants_share_its_caches(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, heard, tenants = pool._asked, [], 1

    async def hearing(process: Any, job: Job, raw: bytes | bytearray) -> Any:
        heard.append(job.tenants)
        return await asked(process, job, raw)

    monkeypatch.setattr(pool, "_asked", hearing)
    place.there._tenants = lambda: tenants
    await place.read("completions", {"prompt": "hello there"})
    tenants = 3
    await place.read("completions", {"prompt": "hello there"})
    assert heard == [1, 3]
