"""Two real LoRA adapters and their base model behind one gateway: each has KV of its own, and imports that and no other."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.real.conftest import running
from tests.real.families.test_adapters_and_drafts import RANK, write_adapter
from tests.real.fleet import Answer, Fleet

ADAPTERS = ("one", "two")
NAMES = ("base", *ADAPTERS)
SHAPE = (30, (576, 576, 192))  # SmolLM2-135M's, the default model
SCALE = 0.02
SMALL = ("--dtype", "float32", "--max-model-len", "1024")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("adapted")
    modules = [f"{name}={write_adapter(folder / name, seed, *SHAPE, SCALE)}" for seed, name in enumerate(ADAPTERS)]
    lora = ("--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2", "--lora-modules", *modules)
    with running(Fleet('served_model_name = "base"\nparity_interval_seconds = 0\n', vllm_args=(*SMALL, *lora))) as fleet:
        yield fleet


def prompt(kind: str, seed: int) -> str | list[int]:
    words = [f"word{number + seed}" for number in range(90)]
    return " ".join(words) if kind == "text" else [1000 + 7 * (number + seed) % 40000 for number in range(330)]


def test_adapters_are_listed_beside_their_base_model(adapted: Fleet) -> None:
    cards = adapted.client.get("/v1/models").raise_for_status().json()["data"]
    assert sorted(card["id"] for card in cards) == sorted(NAMES)
    assert {card["id"]: card.get("parent") for card in cards} == {"base": None, "one": "base", "two": "base"}


def whole_blocks(fleet: Fleet, answer: Answer) -> int:
    """Tokens of an answer's prompt that need not be computed again."""
    with closing(fleet.table("replica-0")) as table:
        whole = (answer.prompt_tokens - 1) // table.block_size * table.block_size
    assert whole > 0
    return whole


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_each_adapter_imports_its_own_kv_and_shares_nothing_with_another_or_the_base_model(adapted: Fleet, kind: str) -> None:
    """Both replicas have the prompt under the names before, and bring nothing of that."""
    asked, answers = prompt(kind, 0), {}
    for name in NAMES:
        with adapted.counting("replica-0") as here:
            cold = adapted.answer(asked, replica="replica-0", model=name)
        whole = whole_blocks(adapted, cold)
        assert (here.local, here.peer, cold.cached_tokens) == (0, 0, 0), name
        with adapted.counting("replica-1") as there:
            imported = adapted.answer(asked, replica="replica-1", model=name)
        assert (there.local, there.peer, there.computed) == (0, whole, cold.prompt_tokens - whole), name
        local = adapted.answer(asked, replica="replica-1", model=name)
        assert (imported.cached_tokens, local.cached_tokens) == (whole, whole)
        assert imported.same_as(local)
        assert imported.close_to(cold)
        answers[name] = imported
    assert len({answer.logprobs for answer in answers.values()}) == len(NAMES)  # adapters do change the answer


def test_what_one_replica_has_under_another_name_only_is_computed(adapted: Fleet) -> None:
    for number, name in enumerate(NAMES):
        asked = prompt("text", 1000 * (number + 1))
        for other in NAMES:
            if other != name:
                adapted.answer(asked, replica="replica-0", model=other)
        with adapted.counting("replica-1") as counted:
            answer = adapted.answer(asked, replica="replica-1", model=name)
        assert (counted.local, counted.peer, counted.computed) == (0, 0, answer.prompt_tokens), name


def test_requests_without_a_wish_go_where_their_adapters_kv_is(adapted: Fleet) -> None:
    """Each name's prompt was computed by one replica alone: the gateway looks it up with the adapter in its keys."""
    for number, name in enumerate(NAMES):
        asked = prompt("ids", 5000 * (number + 1))
        holder = f"replica-{number % 2}"
        adapted.answer(asked, replica=holder, model=name)
        again = adapted.answer(asked, model=name)
        assert again.cached_tokens == whole_blocks(adapted, again), name
