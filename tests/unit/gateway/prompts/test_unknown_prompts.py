"""Of a prompt whose token ids are not known, everything that may become tokens is reckoned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.prompts.prompt_reader import CHARS_PER_TOKEN, MEDIA_TOKENS, KnownPrompt, PromptReader, media_in
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService

IMAGE = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
HI = {"role": "user", "content": "hello"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "x" * 4000, "parameters": {}}}]


@pytest.fixture
def reader(tmp_path: Path) -> PromptReader:
    """One without a tokenizer, for which no prompt is known."""
    return PromptReader(TokenService(TokenizerSource(str(tmp_path))), 1 << 20, lambda: None)


async def tokens(reader: PromptReader, endpoint: Any, body: dict[str, Any]) -> int:
    known = await reader.read(endpoint, body)
    assert isinstance(known, KnownPrompt)
    assert known.ids is None
    return known.tokens


async def test_tools_and_images_count_where_only_the_engine_knows_the_ids(reader: PromptReader) -> None:
    plain = await tokens(reader, "chat", {"messages": [HI]})
    assert await tokens(reader, "chat", {"messages": [HI], "tools": TOOLS}) >= plain + 4000 // CHARS_PER_TOKEN
    seen = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}, IMAGE, IMAGE]}]}
    assert await tokens(reader, "chat", seen) >= plain + 2 * MEDIA_TOKENS


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]}),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image", "source": {}}]}]}
                ]
            },
        ),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    ],
)
async def test_images_of_other_apis_count_too(reader: PromptReader, endpoint: str, body: dict[str, Any]) -> None:
    assert await tokens(reader, endpoint, body) >= MEDIA_TOKENS


async def test_each_pair_of_a_rerank_has_the_query(reader: PromptReader) -> None:
    body = {"query": "q" * 400, "documents": ["d" * 40] * 10}
    assert await tokens(reader, "rerank", body) == (10 * 400 + 10 * 40) // CHARS_PER_TOKEN
    assert await tokens(reader, "score", {"text_1": "a" * 40, "text_2": "b" * 40}) == 80 // CHARS_PER_TOKEN
    assert await tokens(reader, "score", {}) == 0


def test_media_are_found_at_any_depth_and_text_is_none() -> None:
    deep: Any = [IMAGE]
    for _ in range(5000):
        deep = [{"type": "tool_result", "content": deep}]
    assert media_in(deep) == 1
    assert media_in([HI, {"role": "user", "content": "image"}, 7, None]) == 0
