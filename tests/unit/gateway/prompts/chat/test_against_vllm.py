"""Chats rendered here and by the installed vLLM: whatever is rendered here, vLLM takes, and makes the same text of it.

Where ids are sent, vLLM does not look at the messages any more: what it would refuse must not be rendered here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gateway.prompts.canaries import ANSWERED_CHATS, ANSWERED_TOOL_CHATS, CHATS, TOOL_CHATS
from gateway.prompts.chat.request_fields import ids_suffice
from gateway.prompts.chat.template import ChatNotRendered, ChatTemplate
from tests.unit.gateway.prompts.chat.test_template import CHATML, DUMP, PARTS
from tests.unit.gateway.prompts.tiny_model import BOS, EOS, make_model

STRICT = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant', 'system'] %}{{ raise_exception('no ' + m.role) }}"
    "{% endif %}{{ m.role + ':' + m.content }}{% endfor %}"
)
WHOLE_PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p | tojson }}{% endfor %}{% endfor %}"
TEMPLATES = {"dump": DUMP, "chatml": CHATML, "parts": PARTS, "whole parts": WHOLE_PARTS, "strict": STRICT}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": {}}}}
HI = {"role": "user", "content": "hi"}


def say(*parts: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts), **more}]}


class ModelConfig(SimpleNamespace):
    """A model without any of the features that are not given."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class TheirRenderer:
    """vLLM's way from a body to a prompt's text: vllm/renderers/online_renderer.py, without an engine."""

    def __init__(self, directory: Path, template: str, *, exclude_tools: bool) -> None:
        # Half a minute on a busy machine, which is not for whoever only collects tests.
        pytest.importorskip("vllm")
        from transformers import AutoTokenizer
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.renderers import merge_kwargs
        from vllm.renderers.hf import HfRenderer

        self._request_of: Any = ChatCompletionRequest.model_validate
        self._merged, self._render_messages = merge_kwargs, HfRenderer.render_messages
        make_model(directory, template=template, tokenizer_class="PreTrainedTokenizerFast")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        self._exclude_tools = exclude_tools
        config = ModelConfig(model=str(directory), hf_config=SimpleNamespace(model_type="llama"))
        self._renderer: Any = SimpleNamespace(
            model_config=config, get_tokenizer=lambda: tokenizer, use_unified_vision_chunk=False
        )

    def takes(self, body: dict[str, Any]) -> bool:
        """Whether the request passes what vLLM checks of it with ids as well."""
        try:
            self._request_of(copy.deepcopy(body))
        except Exception:  # noqa: BLE001  whatever it is: it is so with ids as well
            return False
        return True

    def render(self, body: dict[str, Any]) -> str | None:
        """The text, None for what vLLM refuses."""
        request = self._request_of(copy.deepcopy(body))
        excluded = request.tool_choice == "none" and self._exclude_tools
        tools = None if request.tools is None or excluded else [tool.model_dump() for tool in request.tools]
        given = {"tools": tools, "tokenize": False}
        params = request.build_chat_params(None, "auto").with_defaults(self._merged(None, given))
        try:
            _, prompt = self._render_messages(self._renderer, request.messages, params)
        except Exception:  # noqa: BLE001  whatever it is, the client gets an error
            return None
        text: str = prompt["prompt"]
        return text


@pytest.fixture(scope="module")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[ChatTemplate, TheirRenderer]]:
    special = {"bos_token": BOS, "eos_token": EOS}
    return {
        (name, exclude): (
            ChatTemplate({"default": template}, special, exclude_tools=exclude),
            TheirRenderer(tmp_path_factory.mktemp("m") / "m", template, exclude_tools=exclude),
        )
        for name, template in TEMPLATES.items()
        for exclude in (False, True)
    }


TEXTS = st.sampled_from(["", "a", " b\n", "é 🦜", "x-anthropic-billing-header: 1\nrest", "x-anthropic-billing-header"])
ODD = st.sampled_from([None, 0, 1.5, True, [], {}, [None], [1], ["s"], {"a": 1}])
PARTS_OF = st.one_of(
    TEXTS,
    ODD,
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "input_text", "output_text", "refusal", "thinking", "tool_reference", "x", None])},
        optional={
            "text": st.one_of(TEXTS, ODD),
            "refusal": st.one_of(TEXTS, st.none()),
            "thinking": st.one_of(TEXTS, st.none()),
            "name": TEXTS,
            "cache_control": st.just({"type": "ephemeral"}),
            "more": ODD,
        },
    ),
    st.fixed_dictionaries({"text": TEXTS}),
)
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(TEXTS, ODD),
        "type": st.sampled_from(["function", "custom", None]),
        "function": st.one_of(
            ODD,
            st.fixed_dictionaries(
                {},
                optional={"name": st.one_of(TEXTS, ODD), "arguments": st.one_of(TEXTS, ODD, st.just('{"a": 1}')), "more": ODD},
            ),
        ),
        "more": ODD,
    },
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "function", "other", 5, None])},
    optional={
        "content": st.one_of(TEXTS, ODD, st.lists(PARTS_OF, max_size=3)),
        "tool_calls": st.one_of(ODD, st.lists(CALLS, max_size=2)),
        "tool_call_id": st.one_of(TEXTS, ODD),
        "name": st.one_of(TEXTS, ODD),
        "task": st.one_of(TEXTS, ODD),
        "reasoning": st.one_of(TEXTS, ODD),
        "reasoning_content": st.one_of(TEXTS, ODD),
        "tools": st.one_of(ODD, st.just([TOOL])),
        "function_call": ODD,
        "refusal": st.one_of(TEXTS, ODD),
        "more": ODD,
    },
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "", 5, None])},
    optional={
        "description": st.one_of(TEXTS, ODD),
        "parameters": st.one_of(ODD, st.just({"b": 1, "a": 2})),
        "strict": ODD,
        "defer_loading": ODD,
        "more": ODD,
    },
)
TOOLS = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["function", "x", None]),
        "function": st.one_of(FUNCTIONS, ODD),
        "defer_loading": ODD,
        "more": ODD,
    },
)
BODIES = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=3)},
    optional={
        "tools": st.one_of(ODD, st.lists(TOOLS, max_size=2), st.just([TOOL])),
        "tool_choice": st.one_of(ODD, st.sampled_from(["none", "auto", "required", "x"])),
        "chat_template_kwargs": st.one_of(
            ODD,
            st.dictionaries(
                st.sampled_from(
                    ["extra", "enable_thinking", "tools", "documents", "bos_token", "messages", "add_generation_prompt"]
                ),
                st.one_of(ODD, TEXTS, st.just("auto")),
                max_size=2,
            ),
        ),
        "reasoning_effort": st.one_of(ODD, st.sampled_from(["none", "low", "max", "auto", "x"])),
        "documents": st.one_of(ODD, st.just([{"title": "t", "text": "x"}]), st.just([{"title": 1}])),
        "add_generation_prompt": st.one_of(ODD, st.sampled_from([True, False, "false", 0, 1])),
        "continue_final_message": st.one_of(ODD, st.sampled_from([True, False, "true"])),
        "response_format": st.just({"type": "json_object"}),
    },
)


@settings(max_examples=300, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(BODIES, st.sampled_from(sorted(TEMPLATES)), st.booleans())
@example(say({"type": "text", "text": None}), "chatml", False)
@example(say({"type": "text"}), "chatml", False)
@example(say({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}), "whole parts", False)
@example(say({"type": "thinking", "thinking": "a"}, role="assistant"), "chatml", False)
@example(say({"type": "refusal", "refusal": None}, role="assistant"), "chatml", False)
@example({"messages": [HI], "tools": [TOOL], "tool_choice": "none"}, "dump", True)
@example({"messages": [HI], "tools": [TOOL], "tool_choice": "none"}, "dump", False)
@example({"messages": [HI], "tools": [TOOL], "tool_choice": None}, "dump", True)
@example({"messages": []}, "chatml", False)
@example(say("a text without a type"), "chatml", False)
@example({"messages": [HI], "add_generation_prompt": 0}, "dump", False)
@example({"messages": [HI], "tools": [{"function": {"name": "f", "strict": 1}}]}, "dump", False)
@example(say({"type": "text", "text": "a", "more": 1}), "whole parts", False)
@example({"messages": [HI], "documents": "x"}, "dump", False)
def test_what_is_rendered_here_is_what_vllm_renders(renderers: Any, body: dict[str, Any], template: str, exclude: bool) -> None:
    ours, theirs = renderers[template, exclude]
    try:
        text = ours.render(body)
    except ChatNotRendered:
        return
    if ids_suffice(body) and theirs.takes(body):
        assert text == theirs.render(body)


@pytest.mark.parametrize(
    "chat", [*CHATS.values(), *TOOL_CHATS.values(), *ANSWERED_CHATS.values(), *ANSWERED_TOOL_CHATS.values()]
)
@pytest.mark.parametrize("exclude", [False, True])
def test_ordinary_chats_are_rendered_here(renderers: Any, chat: dict[str, Any], exclude: bool) -> None:
    rendered = 0
    for template in ("dump", "chatml", "parts", "whole parts"):
        ours, theirs = renderers[template, exclude]
        expected = theirs.render(dict(chat))
        if expected is not None:  # a template may not take what a chat has
            assert ours.render(chat) == expected
            rendered += 1
    assert rendered
