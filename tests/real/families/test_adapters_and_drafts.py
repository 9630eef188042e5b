"""Real LoRA adapters, each with KV of its own, and speculative decoding, whose drafts nobody else ever sees."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.real.families.engines import Family, tokens
from tests.tiny_models import BASE, write_tiny_model
from transport.keys import chain_keys, root_key

BLOCK, RANK, LAYERS = 32, 8, 3
TINY_SIZES = (BASE["hidden_size"], 128, 64)
LENGTH = 10 * BLOCK + 9
WHOLE = 10 * BLOCK


def write_adapter(
    folder: Path, seed: int, layers: int = LAYERS, sizes: tuple[int, int, int] = TINY_SIZES, scale: float = 8.0
) -> str:
    """A rank-8 adapter of all attention's queries and values, with random weights, large beside the model's dummies.

    `sizes` are those of the model's hidden states, of a token's queries and of its values.
    """
    folder.mkdir(parents=True)
    about = {"peft_type": "LORA", "r": RANK, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(about | {"task_type": "CAUSAL_LM"}))
    generator = torch.Generator().manual_seed(seed)
    weights, (hidden, queries, values) = {}, sizes
    for layer in range(layers):
        for name, out in (("q_proj", queries), ("v_proj", values)):
            where = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{where}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) * scale
            weights[f"{where}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * scale
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> Iterator[Family]:
    made = Family(
        tmp_path_factory.mktemp("adapted"), "llama", block_size=BLOCK, enable_lora=True, max_lora_rank=RANK, max_loras=2
    )
    try:
        made.start("a", "b")
        yield made
    finally:
        made.close()


def test_each_adapter_has_kv_of_its_own_and_imports_that(adapted, tmp_path):
    one = ("one", 1, write_adapter(tmp_path / "one", 1))
    two = ("two", 2, write_adapter(tmp_path / "two", 2))
    ids = tokens(LENGTH, 1)
    cold = {lora: adapted.ask("a", ids, lora=lora) for lora in (None, one, two)}
    assert [answer.cached for answer in cold.values()] == [0, 0, 0]
    assert len({str(answer.logprobs) for answer in cold.values()}) == 3  # they do change the answer
    for lora in cold:
        with adapted.counting("b") as counted:
            imported = adapted.ask("b", ids, lora=lora)
        assert counted["peer_tokens_shared_memory"] == imported.cached == WHOLE
        assert imported.same_as(adapted.ask("b", ids, lora=lora))
        assert imported.same_as(adapted.ask("a", ids, lora=lora))


def test_an_adapter_of_the_same_name_with_other_weights_imports_nothing(adapted, tmp_path):
    one = ("name", 3, write_adapter(tmp_path / "first", 1))
    other = ("name", 3, write_adapter(tmp_path / "second", 2))
    ids = tokens(LENGTH, 2)
    adapted.ask("a", ids, lora=one)
    with adapted.counting("b") as counted:
        answer = adapted.ask("b", ids, lora=other)
    assert (answer.cached, counted["peer_tokens_shared_memory"]) == (0, 0)


@pytest.fixture(params=["ngram", "eagle"])
def drafting(request, tmp_path) -> Iterator[tuple[Family, int]]:
    """Engines that draft, and how many layers have KV: an EAGLE draft has one behind the model's, in the same blocks."""
    drafts = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    if request.param == "eagle":
        drafts = {"method": "eagle", "model": str(write_tiny_model(tmp_path / "draft", "llama", num_hidden_layers=1))}
    made = Family(
        tmp_path, "llama", block_size=BLOCK, load_format="dummy", speculative_config=drafts | {"num_speculative_tokens": 5}
    )
    try:
        made.start("a", "b")
        yield made, LAYERS + (request.param == "eagle")
    finally:
        made.close()


def test_drafts_are_never_on_offer_and_what_was_accepted_is_imported_right(drafting):
    engines, layers = drafting
    phrase = tokens(12, 3)
    ids = (phrase * 30)[:LENGTH]  # so that drafts are made all the time
    answer = engines["a"].ask(ids, 3 * BLOCK, logprobs=True, seconds=240)
    said = ids + answer.tokens
    with closing(engines.table("a")) as table:
        assert sum(group.layers for group in table.groups) == layers
        keys = chain_keys(root_key(table.fingerprint), said, BLOCK, table.hash_name)
        held = len(table.longest_run(keys))
        assert table.cached_blocks() == held  # nothing else than what was said
        assert held == (len(said) - 1) // BLOCK
    longer = said + tokens(20, 4)
    with engines.counting("b") as counted:
        imported = engines.ask("b", longer)
    assert counted["peer_tokens_shared_memory"] == held * BLOCK
    assert imported.same_as(engines.ask("b", longer))
    assert imported.same_as(engines.ask("a", longer))
