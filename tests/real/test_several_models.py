"""Two tiny models in one configuration, each on a real replica of its own."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.real.conftest import running
from tests.real.fleet import ANSWER_SECONDS_MAX, Answer, Fleet, answer_of
from tests.tiny_models import write_tiny_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARY = 49152  # the default model's
ARGS = '["--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"]'
ALONE = 'replicas = 1\nhost_memory = "0"\n'
PROMPT = " ".join(f"word{number}" for number in range(60))


def tiny(folder: Path, layers: int, **changes: int) -> Path:
    """A model of random weights with the default model's tokenizer."""
    default = Path(subprocess.check_output([sys.executable, "-m", "engine.default_model"], text=True).splitlines()[-1])
    made = write_tiny_model(folder, "llama", weights=True, vocab_size=VOCABULARY, num_hidden_layers=layers, **changes)
    for name in TOKENIZER:
        if (default / name).exists():
            shutil.copy(default / name, made)
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tables = ""
    for name, layers in (("deep", 3), ("flat", 1)):
        model = tiny(tmp_path_factory.mktemp(name), layers)
        tables += f'[[models]]\nmodel = "{model}"\nserved_model_name = "{name}"\n{ALONE}vllm_args = {ARGS}\n'
    with running(Fleet(tables)) as fleet:
        yield fleet


def direct(fleet: Fleet, model: str) -> Answer:
    """What the replica of a model answers when it is asked past the gateway."""
    socket = fleet.run_dir.with_name(f"{fleet.run_dir.name}-{model}") / f"{model}-0.sock"
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://x", timeout=ANSWER_SECONDS_MAX
    ) as client:
        return answer_of(client.post("/v1/completions", json=fleet.body(PROMPT, model=model)))


def test_each_request_is_answered_by_its_model_and_caches_are_apart(two: Fleet) -> None:
    deep, flat = (two.answer(PROMPT, model=name) for name in ("deep", "flat"))
    assert (deep.replica, flat.replica) == ("deep-0", "flat-0")
    assert (deep.cached_tokens, flat.cached_tokens) == (0, 0)
    assert deep.tokens != flat.tokens
    for name, answer in (("deep", deep), ("flat", flat)):
        again = two.answer(PROMPT, model=name)
        assert again.close_to(answer)
        assert again.cached_tokens > 0
        assert direct(two, name).close_to(answer)


def test_token_ids_are_compared_with_each_models_own_engine(two: Fleet) -> None:
    for name in ("deep", "flat"):
        stats = two.client.get("/kv/stats", params={"model": name}).json()
        assert stats["parity"]["completions"]["parity"] == "exact", stats["parity"]
        assert (stats["parity"]["replica"], stats["totals"]["replicas"]) == (f"{name}-0", 1)


def test_both_models_are_listed_and_no_other_is_served(two: Fleet) -> None:
    assert [card["id"] for card in two.client.get("/v1/models").json()["data"]] == ["deep", "flat"]
    refused = two.client.post("/v1/completions", json=two.body(PROMPT, model="none"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
