"""What a model's own files say of its answers: how long they are at most, and whether the engine parses them."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from gateway.prompts.tokenizer.model_files import (
    ModelFilesError,
    TokenizerSource,
    find_directory,
    read_json,
    renderer_of_its_own,
)


def answer_tokens_default(source: TokenizerSource) -> int | Literal[False] | None:
    """The bound of answers for which no request names one, as vLLM takes it from the model: None for none, False if unknown."""
    try:
        return _max_new_tokens(source.config_of or source.model, source.revision, source.cache_dir)
    except ModelFilesError:
        return False


@lru_cache(maxsize=8)
def _max_new_tokens(model: str, revision: str, cache_dir: str) -> int | Literal[False] | None:
    """Remembered once the files are there, as it is asked for on the path of requests. Raises ModelFilesError."""
    directory = find_directory(TokenizerSource(model, revision, cache_dir))
    found = read_json(directory / "generation_config.json").get("max_new_tokens")
    return found if found is None or type(found) is int else False


def parses_chats(source: TokenizerSource) -> bool:
    """Whether the engine's own way with this model's chats may include a parser, also where that is not known."""
    try:
        return renderer_of_its_own(source) != ""
    except ModelFilesError:
        return True
