"""What vLLM's own request models take, the gateway takes, field by field; but for what is refused on purpose."""

from __future__ import annotations

import copy
import importlib
import json
from typing import Any

import pytest

from gateway.api.body import FORBIDDEN_FIELDS, check_body, decode_body
from gateway.api.endpoints import Endpoint
from gateway.errors import ApiError, UnsupportedParameter
from gateway.prompts.forms import split_prompts

pytest.importorskip("vllm")

HI = {"role": "user", "content": "hi"}
MODELS: list[tuple[str, str, Endpoint, dict[str, Any]]] = [
    ("openai.completion", "CompletionRequest", "completions", {"prompt": "x"}),
    ("openai.chat_completion", "ChatCompletionRequest", "chat", {"messages": [HI]}),
    ("pooling.embed", "EmbeddingCompletionRequest", "embeddings", {"input": "x"}),
    ("pooling.embed", "EmbeddingChatRequest", "embeddings", {"messages": [HI]}),
    ("openai.responses", "ResponsesRequest", "responses", {"input": "x"}),
    ("anthropic", "AnthropicMessagesRequest", "messages", {"model": "m", "messages": [HI], "max_tokens": 4096}),
    ("pooling.scoring", "RerankRequest", "rerank", {"query": "x", "documents": ["y"]}),
    ("pooling.pooling", "PoolingCompletionRequest", "pooling", {"input": "x"}),
]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 1.5, -0.5, "", "x", "1", "none", "auto", "text"),
    *([], [1], [-1], [True], [1.0], ["x"], ["1"], [""], [None], [[1]], [[]], [1, "x"], [{}]),
    *({}, {"a": 1}, {"type": "text"}, [HI], [HI, HI], [[HI]], [{**HI, "content": None}], [{**HI, "content": []}]),
    *([{**HI, "content": [{"type": "text", "text": None}]}], [{"role": "user"}], [{"role": "assistant"}]),
]
# Token ids out of anything but whole numbers, and prompts of nothing: a client's mistake that vLLM makes something of.
ODD_PROMPTS = [[], [True], [1.0], [[]], [-1], [{}]]


def vllm_takes(model: Any, body: dict[str, Any]) -> bool:
    try:
        model.model_validate(copy.deepcopy(body))
    except Exception:  # noqa: BLE001  whatever it is, the client gets an error
        return False
    return True


def gateway_refuses(endpoint: Endpoint, body: dict[str, Any]) -> ApiError | None:
    """The error that the gateway answers by itself."""
    found = decode_body(json.dumps(body).encode())
    try:
        check_body(endpoint, found)
        if endpoint == "completions":
            split_prompts(found["prompt"])
    except ApiError as error:
        return error
    return None


@pytest.mark.parametrize(("module", "name", "endpoint", "base"), MODELS, ids=[name for _, name, _, _ in MODELS])
def test_the_gateway_takes_every_value_of_a_field_that_vllm_takes(
    module: str, name: str, endpoint: Endpoint, base: dict[str, Any]
) -> None:
    model = getattr(importlib.import_module(f"vllm.entrypoints.{module}.protocol"), name)
    taken = refused = 0
    for field, about in model.model_fields.items():
        defaults = [] if about.is_required() or about.default_factory else [about.default]
        for value in [*VALUES, *defaults]:
            if field == "prompt" and value in ODD_PROMPTS:
                continue
            body = {**base, field: value}
            error = gateway_refuses(endpoint, body)
            taken += error is None
            if error is None or not vllm_takes(model, body):
                continue
            says_nothing = value is None or any(value == default and type(value) is type(default) for default in defaults)
            assert isinstance(error, UnsupportedParameter), (field, value, error)
            assert field in FORBIDDEN_FIELDS, (field, value, error)
            assert not says_nothing, (field, value, error)
            refused += 1
    assert taken > 100
    assert refused  # or nothing was compared


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
def test_prompts_of_nothing_and_of_what_is_no_token_id_are_refused(prompt: Any) -> None:
    error = gateway_refuses("completions", {"prompt": prompt})
    assert error is not None
    assert error.status == 400


def test_no_value_of_a_field_is_a_defect_here() -> None:
    for endpoint in ("completions", "chat", "embeddings"):
        for field in ("prompt", "messages", "input", "model", "tools", "stream", *FORBIDDEN_FIELDS):
            for value in VALUES:
                error = gateway_refuses(endpoint, {"prompt": "x", "messages": [HI], field: value})
                assert error is None or error.status == 400
