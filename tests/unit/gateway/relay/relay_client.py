"""What the relay's tests send, and how they read the answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai

from tests.unit.gateway.running_door import Door

COMPLETION = {"model": "fake-model", "prompt": "hello", "max_tokens": 3}
CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
KEYS = [{"name": "a", "api_key": "key-of-a-1"}, {"name": "b", "api_key": "key-of-b-1", "salt": "pepper"}]


def client_of(door: Door, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=door.url + "/v1", api_key="none", max_retries=0, **options)


async def lines_of(door: Door, path: str, body: dict[str, Any], **options: Any) -> list[str]:
    """The data lines of an event stream, to its clean end."""
    async with door.session.post(door.url + path, json=body, **options) as answer:
        assert answer.status == 200
        return [line for line in (await answer.text()).splitlines() if line]


async def chunks_of(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 1024):
        yield b"x" * 1024
