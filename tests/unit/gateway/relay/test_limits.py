"""Keys with limits over the real front door: exact, told in OpenAI's words, and settled with what was used."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.tenants.key_file import write_keys
from gateway.tenants.keys import Key, no_keys
from tests.unit.gateway.limits.limited_keys import limited
from tests.unit.gateway.relay.relay_client import CHAT, COMPLETION
from tests.unit.gateway.running_door import Door, running_door, until

CLIENTS = 64
PROMPT_TOKENS = len(COMPLETION["prompt"])


def headers(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


class limited_door:
    """A front door with one replica and these keys; the token of each is its name."""

    def __init__(self, directory: Path, *keys: Key, **values: Any) -> None:
        path = directory / "keys.toml"
        content = no_keys()
        for key in keys:
            content = content.with_key(key)
        write_keys(path, content)
        self._running = running_door(directory, keys_file=path, **values)

    async def __aenter__(self) -> Door:
        door = await self._running.__aenter__()
        await door.add_engine("replica-0")
        return door

    async def __aexit__(self, *error: Any) -> None:
        await self._running.__aexit__(*error)


async def statuses(door: Door, count: int, body: dict[str, Any], token: str = "a") -> Counter[int]:
    async def one() -> int:
        async with door.session.post(door.url + "/v1/completions", json=body, headers=headers(token)) as answer:
            await answer.read()
            return answer.status

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


@pytest.mark.parametrize(("path", "told"), [("/v1/completions", True), ("/v1/messages", False)])
async def test_engines_that_schedule_by_priority_are_told_the_class_of_the_key(tmp_path: Path, path: str, told: bool) -> None:
    keys = [limited(name, tokens_per_minute=10_000, priority=name) for name in ("high", "normal", "low")]
    async with limited_door(tmp_path, *keys, ranked=True) as door:
        for key in keys:
            body = {**COMPLETION, "messages": [{"role": "user", "content": "x"}], "model": "fake-model"}
            assert (await door.post(path, body, headers=headers(key.name)))[0] == 200
        seen = [request["body"].get("priority") for request in (await door.seen("replica-0"))["requests"]]
    assert seen == ([0, 1, 2] if told else [None, None, None])


def used(door: Door, limit: str) -> int:
    return door.limiter.uses()[0].keys[0].limits[limit].used


async def test_64_clients_get_exactly_as_many_answers_as_the_minute_has(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(requests_per_minute=100)) as door:
        found: Counter[int] = Counter()

        async def client() -> None:
            nonlocal found
            for _ in range(4):
                found += await statuses(door, 1, COMPLETION)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        assert found == {200: 100, 429: 4 * CLIENTS - 100}
        assert (await door.seen("replica-0"))["finished"] == 100


async def test_64_clients_never_have_more_under_way_than_they_may(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(requests_in_flight_max=5)) as door:
        found = await statuses(door, CLIENTS, COMPLETION | {"fake": {"delay": 0.5}})
        assert found == {200: 5, 429: CLIENTS - 5}
        assert await statuses(door, 5, COMPLETION) == {200: 5}
        assert used(door, "requests_in_flight_max") == 0


async def test_64_clients_cannot_overshoot_a_budget_of_tokens(tmp_path: Path) -> None:
    each = PROMPT_TOKENS + 3
    async with limited_door(tmp_path, limited(tokens_per_day=10 * each + 7)) as door:
        found = await statuses(door, CLIENTS, COMPLETION | {"fake": {"delay": 0.3}})
        assert found == {200: 10, 429: CLIENTS - 10}
        assert used(door, "tokens_per_day") == 10 * each


async def test_refusals_are_openais_to_its_client(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(requests_per_minute=1)) as door:
        async with openai.AsyncOpenAI(base_url=door.url + "/v1", api_key="a", max_retries=0) as client:
            await client.completions.create(model="fake-model", prompt="hello", max_tokens=3)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.completions.create(model="fake-model", prompt="hello", max_tokens=3)
        error = caught.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        assert error.response.headers["retry-after"] == "61"
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"


@pytest.mark.parametrize("body", [COMPLETION, COMPLETION | {"stream": True}, {"prompt": 5}])
async def test_every_answer_of_a_limited_key_has_the_headers(tmp_path: Path, body: dict[str, Any]) -> None:
    async with limited_door(tmp_path, limited(requests_per_minute=9, tokens_per_minute=100), limited("free")) as door:
        async with door.session.post(door.url + "/v1/completions", json=body, headers=headers("a")) as answer:
            assert answer.headers["x-ratelimit-limit-requests"] == "9"
            assert answer.headers["x-ratelimit-remaining-requests"] == "8"
            assert answer.headers["x-ratelimit-limit-tokens"] == "100"
            await answer.read()
        _, _, models = await door.get("/v1/models", headers=headers("a"))
        assert models["x-ratelimit-remaining-requests"] == "8"
        _, _, free = await door.post("/v1/completions", COMPLETION, headers=headers("free"))
        assert not [name for name in free if name.lower().startswith("x-ratelimit")]


async def test_a_whole_answer_tells_what_is_left_after_it(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=100)) as door:
        body = COMPLETION | {"max_tokens": None}
        _, _, found = await door.post("/v1/completions", body, headers=headers("a"))
        assert found["x-ratelimit-remaining-tokens"] == str(100 - PROMPT_TOKENS - 16)


@pytest.mark.parametrize("asked", [None, {"include_usage": True}, {"include_usage": False, "continuous_usage_stats": True}])
async def test_a_stream_is_settled_with_its_usage_which_only_who_asks_gets(tmp_path: Path, asked: Any) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=1000)) as door:
        body = CHAT | {"stream": True} | ({} if asked is None else {"stream_options": asked})
        async with door.session.post(door.url + "/v1/chat/completions", json=body, headers=headers("a")) as answer:
            events = [line[6:] for line in (await answer.text()).splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        shown = asked is not None and asked["include_usage"]
        assert ["usage" in chunk for chunk in chunks] == [False] * 3 + [True] * shown
        [use] = door.limiter.uses()
        assert use.generated_tokens == 3
        assert use.uncached_tokens == len("<user>hello</user><assistant>")
        assert used(door, "tokens_per_minute") == use.charged_tokens


async def test_a_stream_that_its_client_leaves_is_charged_as_far_as_it_went(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=1000, requests_in_flight_max=1)) as door:
        body = COMPLETION | {"stream": True, "max_tokens": 500, "fake": {"token_delay": 0.02}}
        async with door.session.post(door.url + "/v1/completions", json=body, headers=headers("a")) as answer:
            for _ in range(5):
                await answer.content.readuntil(b"\n\n")
            assert used(door, "tokens_per_minute") == PROMPT_TOKENS + 500
            answer.close()
        await until(lambda: used(door, "requests_in_flight_max") == 0)
        assert PROMPT_TOKENS + 5 <= used(door, "tokens_per_minute") < PROMPT_TOKENS + 100


async def test_what_engines_refuse_or_fail_at_is_not_charged(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=1000, requests_per_minute=9)) as door:
        for fake in ({"status": 400}, {"status": 500}, {"drop": "before"}):
            await statuses(door, 1, COMPLETION | {"fake": fake})
        assert used(door, "tokens_per_minute") == 0
        assert used(door, "requests_per_minute") == 3


async def test_a_request_that_goes_to_a_second_replica_is_charged_once(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=1000, requests_per_minute=9)) as door:
        await door.add_engine("replica-1")
        assert await statuses(door, 1, COMPLETION | {"fake": {"on": "replica-0", "status": 503}}) == {200: 1}
        assert used(door, "tokens_per_minute") == PROMPT_TOKENS + 3
        assert used(door, "requests_per_minute") == 1


async def test_a_model_that_the_key_may_not_use_does_not_exist_for_it(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(models=("other",)), limited("b", models=("fake-model",))) as door:
        for model in ("fake-model", "never", None):
            status, body, _ = await door.post("/v1/completions", COMPLETION | {"model": model}, headers=headers("a"))
            assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
            assert "does not exist or you do not have access to it" in body["error"]["message"]
        status, body, _ = await door.get("/v1/models/fake-model", headers=headers("a"))
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert (await door.get("/v1/models", headers=headers("a")))[1] == {"object": "list", "data": []}
        assert [card["id"] for card in (await door.get("/v1/models", headers=headers("b")))[1]["data"]] == ["fake-model"]
        assert (await door.get("/v1/models/fake-model", headers=headers("b")))[0] == 200
        assert await statuses(door, 1, {"prompt": "hello"}, "b") == {200: 1}


async def test_bounds_are_put_into_the_body_of_requests_that_name_none(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(max_tokens_max=5, n_max=2), answer_tokens_default=7) as door:
        await door.post("/v1/chat/completions", {"messages": CHAT["messages"]}, headers=headers("a"))
        [seen] = (await door.seen("replica-0"))["requests"]
        assert seen["body"]["max_completion_tokens"] == 5
        status, body, _ = await door.post("/v1/completions", COMPLETION | {"n": 3}, headers=headers("a"))
        assert (status, body["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("named", [{}, {"max_tokens": 50}])
async def test_a_chat_too_large_for_its_key_is_told_what_was_reserved_for_it(tmp_path: Path, named: dict[str, int]) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=20), answer_tokens_default=40) as door:
        body = {"messages": CHAT["messages"]} | named
        status, answer, _ = await door.post("/v1/chat/completions", body, headers=headers("a"))
        told = "It names no 'max_tokens', so 40 were reserved for each answer" in answer["error"]["message"]
        assert (status, told) == (429, not named)


async def test_a_key_that_is_taken_away_does_not_disturb_its_requests_under_way(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(requests_in_flight_max=2)) as door:
        body = COMPLETION | {"stream": True, "max_tokens": 20, "fake": {"token_delay": 0.01}}
        async with door.session.post(door.url + "/v1/completions", json=body, headers=headers("a")) as answer:
            await answer.content.readuntil(b"\n\n")
            door.tenants.use(no_keys())
            assert (await answer.read()).endswith(b"[DONE]\n\n")
        assert await statuses(door, 1, COMPLETION) == {401: 1}
        await until(lambda: len(door.limiter.book) == 0)


async def test_a_body_that_does_not_come_holds_no_place(tmp_path: Path) -> None:
    async with limited_door(tmp_path, limited(requests_in_flight_max=1), body_seconds_max=0.2) as door:

        async def half() -> Any:
            yield b'{"prompt"'
            await asyncio.sleep(30)

        sent = {"data": half(), "headers": headers("a") | {"content-type": "application/json"}}
        async with door.session.post(door.url + "/v1/completions", **sent) as answer:
            assert answer.status == 408
            assert answer.headers["x-ratelimit-limit-requests"] == "1"
        assert await statuses(door, 1, COMPLETION) == {200: 1}


@pytest.mark.parametrize("field", [{"stream": 1}, {"stream": "true"}, {"stream_interval": "1000"}, {"stream_interval": 0}])
async def test_what_decides_the_charge_has_to_have_its_type(tmp_path: Path, field: dict[str, Any]) -> None:
    async with limited_door(tmp_path, limited(tokens_per_minute=1000)) as door:
        status, body, _ = await door.post("/v1/completions", COMPLETION | field, headers=headers("a"))
        assert (status, body["error"]["param"]) == (400, next(iter(field)))
        assert used(door, "tokens_per_minute") == 0


@pytest.mark.parametrize(
    "prompt", [[[7] * 100 for _ in range(5)], ["\N{SMILE}" * 100 for _ in range(5)], [7] * 500], ids=["ids", "wide", "one"]
)
async def test_prompts_whose_ids_are_not_known_are_reserved_for(tmp_path: Path, prompt: list[Any]) -> None:
    """The engine cuts them, so the gateway does not know what is left; what it may come to at most exceeds the limit."""
    async with limited_door(tmp_path, limited(tokens_per_minute=450)) as door:
        body = COMPLETION | {"prompt": prompt, "truncate_prompt_tokens": 100, "max_tokens": 1}
        status, found, _ = await door.post("/v1/completions", body, headers=headers("a"))
        assert (status, found["error"]["code"]) == (429, "rate_limit_exceeded")
