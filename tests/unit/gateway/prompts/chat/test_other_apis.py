"""Requests of the Messages and Responses API become the chats that vLLM makes of them."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest

from gateway.prompts.chat.conversation import ChatNotRendered, conversation, conversation_tools
from gateway.prompts.chat.other_apis import chat_of_messages, chat_of_response

HI = {"role": "user", "content": "hello"}
SCHEMA = {"properties": {"x": {"type": "integer"}}}
TOOL = {"name": "f", "description": "does it", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "done"}
PARTS = [{"type": "text", "text": "done"}, {"type": "text", "text": "well"}]
MESSAGES: list[dict[str, Any]] = [
    {"messages": [HI]},
    {"messages": [HI], "system": "be short"},
    {"messages": [HI], "system": ""},
    {"messages": [HI], "system": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]},
    {"messages": [HI], "system": [{"type": "text", "text": "x-anthropic-billing-header: 1"}, {"type": "text", "text": "a"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]}]},
    {"messages": [HI, {"role": "assistant", "content": [{"type": "text", "text": "so"}, USE]}, HI]},
    {"messages": [HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}], "tools": [TOOL]},
    {"messages": [HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT, PARTS[0]]}]},
    {"messages": [HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [{**RESULT, "content": PARTS}]}]},
    {"messages": [HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, PARTS[0]]}, HI]},
    {"messages": [HI, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, HI]},
    {"messages": [HI], "tools": [TOOL], "tool_choice": {"type": "none"}},
    {"messages": [HI], "tools": [{**TOOL, "strict": True}], "tool_choice": {"type": "any"}},
    {"messages": [HI], "tools": []},
    {"messages": [HI], "output_config": {"effort": "low"}},
]
OUTPUT: dict[str, Any] = {"type": "message", "id": "m", "role": "assistant", "status": "completed"}
OUTPUT = {**OUTPUT, "content": [{"type": "output_text", "text": "so", "annotations": []}]}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"x": 1}'}
CALLED = {"type": "function_call_output", "call_id": "c", "output": "done"}
RESPONSES: list[dict[str, Any]] = [
    {"input": "hello"},
    {"input": "hello", "instructions": "be short"},
    {"input": [HI]},
    {"input": [{"role": "developer", "content": "be short"}, HI]},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]},
    {"input": [HI, {"role": "assistant", "content": "so"}, HI]},
    {"input": [HI, OUTPUT, HI]},
    {"input": [HI, CALL, CALLED]},
    {"input": [HI, OUTPUT, CALL, {**CALL, "call_id": "d"}, CALLED, {**CALLED, "call_id": "d"}, HI]},
    {"input": [HI, CALL, OUTPUT, HI]},
    {
        "input": [HI],
        "tools": [{"type": "function", "name": "f", "description": "does it", "parameters": SCHEMA, "strict": True}],
    },
]


def vllms(module: str, name: str) -> Any:
    pytest.importorskip("vllm")
    return getattr(importlib.import_module(f"vllm.entrypoints.{module}"), name)


def as_templates_see(messages: list[Any], tools: Any, content_format: Any) -> tuple[Any, Any]:
    return conversation(messages, content_format, True), conversation_tools(tools or None)


@pytest.mark.parametrize("content_format", ["string", "openai"])
@pytest.mark.parametrize("body", MESSAGES)
def test_a_messages_request_is_the_chat_that_vllm_makes_of_it(body: dict[str, Any], content_format: str) -> None:
    serving = vllms("anthropic.serving", "AnthropicServingMessages")
    asked = vllms("anthropic.protocol", "AnthropicMessagesRequest")
    chat = serving.to_chat_completion_request(asked.model_validate(copy.deepcopy({"model": "m", "max_tokens": 5, **body})))
    theirs = chat.model_dump(exclude_none=True)
    messages = [dict(message) for message in chat.messages]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = list(message["tool_calls"])
    ours = chat_of_messages(body)
    assert as_templates_see(ours["messages"], ours.get("tools"), content_format) == as_templates_see(
        messages, theirs.get("tools"), content_format
    )
    assert ours.get("reasoning_effort") == theirs.get("reasoning_effort")
    assert (ours.get("tool_choice") == "none") == (theirs.get("tool_choice") == "none")


@pytest.mark.parametrize("body", RESPONSES)
def test_a_responses_request_is_the_chat_that_vllm_makes_of_it(body: dict[str, Any]) -> None:
    asked = vllms("openai.responses.protocol", "ResponsesRequest").model_validate(copy.deepcopy(body))
    messages = vllms("openai.responses.utils", "construct_input_messages")(
        request_instructions=asked.instructions, request_input=asked.input
    )
    tools = vllms("openai.responses.utils", "construct_tool_dicts")(asked.tools, asked.tool_choice)
    messages = [dict(message) if isinstance(message, dict) else message.model_dump(exclude_none=True) for message in messages]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [{**call, "function": dict(call["function"])} for call in message["tool_calls"]]
    ours = chat_of_response(body)
    assert as_templates_see(ours["messages"], ours.get("tools"), "string") == as_templates_see(messages, tools, "string")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "system", "content": "x"}, HI]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f"}]}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [7]},
        {"messages": [HI], "thinking": {"type": "disabled"}},
        {"messages": [HI], "tools": [7]},
        {"messages": [HI], "system": 7},
    ],
)
def test_what_is_not_followed_in_messages_is_left_to_the_engine(body: dict[str, Any]) -> None:
    with pytest.raises(ChatNotRendered):
        chat_of_messages(body)


@pytest.mark.parametrize(
    "body",
    [
        {"input": "x", "previous_response_id": "resp_1"},
        {"input": "x", "truncation": "auto"},
        {"input": 7},
        {"input": [7]},
        {"input": [{"type": "reasoning", "id": "r", "summary": []}]},
        {"input": [HI, {**OUTPUT, "status": "incomplete"}]},
        {"input": "x", "tools": [{"type": "web_search"}]},
        {"input": [{**CALL, "namespace": "n"}]},
    ],
)
def test_what_is_not_followed_in_responses_is_left_to_the_engine(body: dict[str, Any]) -> None:
    with pytest.raises(ChatNotRendered):
        chat_of_response(body)
