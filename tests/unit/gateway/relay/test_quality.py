"""Who may get KV that lost something: callers who accept it, if the operator keeps any so, and nobody who wants it exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.settings import Tenant
from tests.unit.gateway.relay.relay_client import CHAT, COMPLETION
from tests.unit.gateway.running_door import running_door
from transport.table.quality import is_lossy_salt

TENANTS = (
    Tenant(name="a", api_key=SecretStr("key-of-a"), accepts_loss=True),
    Tenant(name="b", api_key=SecretStr("key-of-b")),
)


async def asked(directory: Path, cases: list[tuple[str, str | None]], path: str, body: Any, **settings: Any) -> list[Any]:
    """For each key and x-peerkv-quality: the answer's status, what it says of its quality, and the salt the engine got."""
    found = []
    async with running_door(directory, tenants=TENANTS, **settings) as door:
        engine = await door.add_engine("replica-0")
        for key, quality in cases:
            headers = {"authorization": f"Bearer {key}"} | ({} if quality is None else {"x-peerkv-quality": quality})
            async with door.session.post(door.url + path, json=body, headers=headers) as answer:
                await answer.read()
                salt = engine.seen["requests"][-1]["body"]["cache_salt"] if answer.status == 200 else None
                found.append((answer.status, answer.headers.get("x-peerkv-quality"), salt))
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | {"stream": True}),
        ("/v1/chat/completions", CHAT),
        ("/v1/responses", {"input": "hello"}),
        ("/v1/messages", CHAT | {"max_tokens": 4}),
        ("/v1/embeddings", {"input": "hello"}),
    ],
    ids=["completions", "stream", "chat", "responses", "messages", "embeddings"],
)
async def test_a_caller_who_accepts_loss_has_a_cache_of_its_own_for_it_and_may_ask_for_exact_kv(
    tmp_path: Path, path: str, body: Any
) -> None:
    cases = [("key-of-a", None), ("key-of-a", "lossy"), ("key-of-a", "exact"), ("key-of-b", None), ("key-of-b", "lossy")]
    first, lossy, exact, other, refused = await asked(tmp_path, cases, path, body, lossy="int8")
    assert (first[:2], lossy[:2]) == ((200, "lossy"), (200, "lossy"))
    assert first[2] == lossy[2]
    assert is_lossy_salt(first[2])
    for status, told, salt in (exact, other, refused):
        assert (status, told) == (200, None)
        assert not is_lossy_salt(salt)
    assert len({first[2], exact[2], other[2]}) == 3


async def test_where_nothing_is_kept_with_loss_nothing_changes(tmp_path: Path) -> None:
    cases = [("key-of-a", None), ("key-of-a", "lossy"), ("key-of-a", "exact")]
    found = await asked(tmp_path, cases, "/v1/completions", COMPLETION)
    assert {(status, told) for status, told, _ in found} == {(200, None)}
    assert len({salt for *_, salt in found}) == 1
    assert not is_lossy_salt(found[0][2])


async def test_an_error_says_nothing_of_quality(tmp_path: Path) -> None:
    body = COMPLETION | {"model": "another"}
    assert await asked(tmp_path, [("key-of-a", "lossy")], "/v1/completions", body, lossy="int8") == [(404, None, None)]


async def test_another_quality_is_an_error(tmp_path: Path) -> None:
    assert await asked(tmp_path, [("key-of-b", "best")], "/v1/completions", COMPLETION, lossy="int8") == [(400, None, None)]
