"""A model that sees: the same text is another prompt with another image, and an image is the same wherever it is sent."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.gpu.replica import prompt
from tests.real.families.engines import Family
from tests.tiny_image_model import IMAGE_TOKENS, WORDS_END, write_tiny_image_model

BLOCK = 32
WORDS = 140
WHOLE = (IMAGE_TOKENS + WORDS - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Iterator[Family]:
    folder = tmp_path_factory.mktemp("seeing")
    model = write_tiny_image_model(folder / "model")
    chosen = {"block_size": BLOCK, "max_model_len": 1024, "skip_tokenizer_init": False, "load_format": "auto"}
    made = Family(folder, "blip2", model, limit_mm_per_prompt={"image": 1}, **chosen)
    try:
        made.start("a", "b")
        yield made
    finally:
        made.close()


def image(seed: int) -> dict[str, Any]:
    """Noise, the same for the same seed, as a part of vLLM's prompt."""
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    return {"multi_modal_data": {"image": Image.fromarray(pixels)}}


def test_an_image_and_its_text_are_imported_to_the_last_bit(seeing):
    ids = prompt(WORDS, 1, WORDS_END)
    cold = seeing.ask("a", ids, **image(1))
    local = seeing.ask("a", ids, **image(1))
    with seeing.counting("b") as counted:
        imported = seeing.ask("b", ids, **image(1))
    assert (cold.cached, local.cached, imported.cached) == (0, WHOLE, WHOLE)
    assert counted["peer_tokens_shared_memory"] == WHOLE
    assert imported.same_as(local)
    assert imported.tokens == cold.tokens


def test_the_same_text_with_another_image_shares_nothing(seeing):
    ids = prompt(WORDS, 2, WORDS_END)
    one = seeing.ask("a", ids, **image(1))
    with seeing.counting("b") as counted:
        other = seeing.ask("b", ids, **image(2))
        same = seeing.ask("a", ids, **image(2))
    assert other.tokens == same.tokens
    assert other.logprobs != one.logprobs  # the image does decide
    assert (other.cached, counted["peer_tokens_shared_memory"]) == (0, 0)


def test_a_text_without_an_image_shares_nothing_with_one_behind_an_image(seeing):
    ids = prompt(WORDS, 3, WORDS_END)
    seeing.ask("a", ids, **image(1))
    with seeing.counting("b") as counted:
        assert seeing.ask("b", ids).cached == 0
    assert counted["peer_tokens_shared_memory"] == 0
