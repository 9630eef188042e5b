"""What browsers are told about pages of other origins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.settings import Settings
from tests.unit.gateway.running_door import Door, running_door

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 1}
PAGE = "https://chat.example"
KEYS = [{"name": "a", "api_key": "key-of-a-1"}]
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with running_door(tmp_path, tenants=KEYS, cors_origins=[PAGE, "http://localhost:3000"]) as door:
        await door.add_engine("replica-0")
        yield door


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/v1/nothing", "/health"])
async def test_a_preflight_needs_no_key(door: Door, path: str) -> None:
    async with door.session.options(door.url + path, headers=PREFLIGHT) as answer:
        assert answer.status == 204
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["vary"] == "origin"
    assert door.relay.counters.requests == 0


@pytest.mark.parametrize(
    ("method", "path", "key", "status"),
    [
        ("POST", "/v1/completions", "key-of-a-1", 200),
        ("POST", "/v1/completions", "wrong", 401),
        ("POST", "/v1/nothing", "key-of-a-1", 404),
        ("GET", "/v1/completions", "key-of-a-1", 405),
        ("GET", "/ready", "wrong", 200),
    ],
)
async def test_a_page_may_read_answers_and_errors(door: Door, method: str, path: str, key: str, status: int) -> None:
    headers = {"origin": "http://localhost:3000", "authorization": f"Bearer {key}"}
    body = COMPLETION if method == "POST" else None
    for _ in range(2):  # the second head is known by its bytes
        async with door.session.request(method, door.url + path, json=body, headers=headers) as answer:
            assert answer.status == status
            assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
            shown = answer.headers["access-control-expose-headers"].split(", ")
            assert {"x-request-id", "x-peerkv-cache", "x-peerkv-quality"} <= set(shown)


async def test_a_streamed_answer_may_be_read_too(door: Door) -> None:
    headers = {"origin": PAGE, "authorization": "Bearer key-of-a-1"}
    async with door.session.post(door.url + "/v1/completions", json=COMPLETION | {"stream": True}, headers=headers) as answer:
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert (await answer.text()).endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("headers", [{}, {"origin": "https://evil.example"}, {"origin": "null"}])
async def test_other_pages_are_not_told_that_they_may(door: Door, headers: dict[str, str]) -> None:
    async with door.session.get(door.url + "/health", headers=headers) as answer:
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["vary"] == "origin"  # a cache must not give one page's answer to another
    async with door.session.options(door.url + "/v1/completions", headers=PREFLIGHT | headers) as answer:
        assert (answer.status == 204) == (not headers)


@pytest.mark.parametrize("path", ["/kv/stats", "/kv/flush", "/metrics", "/replicas", "/replicas/replica-0/drain"])
async def test_what_the_admin_rule_guards_is_for_no_page(tmp_path: Path, path: str) -> None:
    async with running_door(tmp_path, cors_origins=["*"]) as door:
        async with door.session.options(door.url + path, headers=PREFLIGHT) as answer:
            assert answer.status != 204
            assert "access-control-allow-origin" not in answer.headers
        async with door.session.get(door.url + path, headers={"origin": PAGE}) as answer:
            assert "access-control-allow-origin" not in answer.headers


async def test_all_pages_may_where_the_settings_say_so(tmp_path: Path) -> None:
    async with running_door(tmp_path, cors_origins=["*"]) as door:
        status, _, headers = await door.get("/v1/models", headers={"origin": PAGE})
        assert (status, headers["access-control-allow-origin"]) == (503, "*")


async def test_without_the_setting_there_is_no_word_of_it(tmp_path: Path) -> None:
    async with running_door(tmp_path) as door:
        async with door.session.get(door.url + "/health", headers={"origin": PAGE}) as answer:
            assert "access-control-allow-origin" not in answer.headers
            assert "vary" not in answer.headers
        async with door.session.options(door.url + "/v1/completions", headers=PREFLIGHT) as answer:
            assert answer.status == 405


@pytest.mark.parametrize(
    "origin", ["chat.example", "https://chat.example/", "https://chat.example/path", "https://*", "HTTPS://A.b"]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ValueError, match="is neither an origin"):
        Settings(cors_origins=[origin])


def test_origins_are_given_as_words_or_as_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("https://a.example http://[::1]:3000", '["https://a.example", "http://[::1]:3000"]'):
        monkeypatch.setenv("PEERKV_CORS_ORIGINS", text)
        assert Settings().cors_origins == ("https://a.example", "http://[::1]:3000")
