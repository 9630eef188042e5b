"""Three tiny models in one configuration, each on a real replica of its own: two answer, one scores."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real.conftest import running
from tests.real.fleet import ANSWER_SECONDS_MAX, Answer, Fleet, answer_of
from tests.tiny_models import write_tiny_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
VOCABULARY = 49152  # the default model's
ARGS = '"--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "64M"'
ALONE = 'replicas = 1\nhost_memory = "0"\n'
JUDGE = {"num_labels": 1, "pad_token_id": 2, "architectures": ["LlamaForSequenceClassification"]}
PROMPT = " ".join(f"word{number}" for number in range(60))


def tiny(folder: Path, layers: int, **changes: Any) -> Path:
    """A model of random weights with the default model's tokenizer."""
    default = Path(subprocess.check_output([sys.executable, "-m", "engine.default_model"], text=True).splitlines()[-1])
    made = write_tiny_model(folder, "llama", weights=True, vocab_size=VOCABULARY, num_hidden_layers=layers, **changes)
    for name in TOKENIZER:
        if (default / name).exists():
            shutil.copy(default / name, made)
    return made


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    tables = ""
    for name, layers in (("deep", 3), ("flat", 1)):
        model = tiny(tmp_path_factory.mktemp(name), layers)
        tables += f'[[models]]\nmodel = "{model}"\nserved_model_name = "{name}"\n{ALONE}vllm_args = [{ARGS}]\n'
    model = tiny(tmp_path_factory.mktemp("judge"), 2, scores=True, **JUDGE)
    tables += f'[[models]]\nmodel = "{model}"\nserved_model_name = "judge"\n{ALONE}'
    tables += f'vllm_args = [{ARGS}, "--runner", "pooling"]\n'
    with running(Fleet(tables, replicas=3)) as fleet:
        yield fleet


def past_the_gateway(fleet: Fleet, model: str, path: str, body: dict[str, Any]) -> httpx.Response:
    """What the replica of a model answers when it is asked itself."""
    socket = fleet.run_dir.with_name(f"{fleet.run_dir.name}-{model}") / f"{model}-0.sock"
    with httpx.Client(
        transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://x", timeout=ANSWER_SECONDS_MAX
    ) as client:
        return client.post(path, json=body)


def direct(fleet: Fleet, model: str) -> Answer:
    """What the replica of a model completes when it is asked itself."""
    return answer_of(past_the_gateway(fleet, model, "/v1/completions", fleet.body(PROMPT, model=model)))


def test_each_request_is_answered_by_its_model_and_caches_are_apart(several: Fleet) -> None:
    deep, flat = (several.answer(PROMPT, model=name) for name in ("deep", "flat"))
    assert (deep.replica, flat.replica) == ("deep-0", "flat-0")
    assert (deep.cached_tokens, flat.cached_tokens) == (0, 0)
    assert deep.tokens != flat.tokens
    for name, answer in (("deep", deep), ("flat", flat)):
        again = several.answer(PROMPT, model=name)
        assert again.close_to(answer)
        assert again.cached_tokens > 0
        assert direct(several, name).close_to(answer)


def test_token_ids_are_compared_with_each_models_own_engine(several: Fleet) -> None:
    for name in ("deep", "flat"):
        stats = several.client.get("/kv/stats", params={"model": name}).json()
        assert stats["parity"]["completions"]["parity"] == "exact", stats["parity"]
        assert (stats["parity"]["replica"], stats["totals"]["replicas"]) == (f"{name}-0", 1)


QUERY, DOCUMENTS = "Where is the river?", ["The river is behind the house.", "Nobody knows.", "A cat sleeps."]
WORDS = {"text_1": QUERY, "text_2": DOCUMENTS}


def asked(fleet: Fleet, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """What the gateway answers for the model that scores; the same as its replica."""
    body = {"model": "judge", **body}
    answer = fleet.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-peerkv-replica"] == "judge-0"
    found, alone = answer.json(), past_the_gateway(fleet, "judge", path, body).raise_for_status().json()
    for one in (found, alone):
        one.pop("id")
        one.pop("created", None)
    assert found == alone
    return found


def test_texts_are_scored_and_ranked_by_a_model_that_can_and_a_pooler_tells_its_output(several: Fleet) -> None:
    for path in ("/v1/score", "/score"):
        scores = [each["score"] for each in asked(several, path, WORDS)["data"]]
    assert len(set(scores)) == len(DOCUMENTS)
    best_first = sorted(range(len(DOCUMENTS)), key=lambda index: -scores[index])
    for path in ("/v1/rerank", "/rerank"):
        ranked = asked(several, path, {"query": QUERY, "documents": DOCUMENTS})["results"]
    assert [each["index"] for each in ranked] == best_first
    assert [each["relevance_score"] for each in ranked] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    pooled = [asked(several, "/pooling", {"input": text})["data"][0]["data"] for text in (PROMPT, DOCUMENTS[1])]
    assert pooled[0] != pooled[1]


def test_a_model_that_scores_answers_nothing_else_and_the_others_do_not_score(several: Fleet) -> None:
    for path, body in (("/v1/completions", {"model": "judge", "prompt": "a"}), ("/v1/score", {"model": "deep", **WORDS})):
        refused = several.client.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unsupported_endpoint"), refused.text


def test_all_models_are_listed_and_no_other_is_served(several: Fleet) -> None:
    assert [card["id"] for card in several.client.get("/v1/models").json()["data"]] == ["deep", "flat", "judge"]
    refused = several.client.post("/v1/completions", json=several.body(PROMPT, model="none"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
