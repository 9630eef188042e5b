"""Requests of the Messages API (Anthropic's) and the Responses API (OpenAI's) as the chats that vLLM makes of them.

Follows `to_chat_completion_request` in vllm/entrypoints/anthropic/serving.py and `construct_input_messages` in
vllm/entrypoints/openai/responses/utils.py (0.32), for texts and function tools. What they do with anything else is not
followed: such a request is steered by load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from gateway.prompts.chat.conversation import ChatNotRendered

_BILLING_HEADER = "x-anthropic-billing-header"
Body = Mapping[str, Any]
Chat = dict[str, Any]


def chat_of_messages(body: Body) -> Chat:
    """A Messages request as a chat's body, with the fields that its prompt depends on. Raises ChatNotRendered."""
    messages: list[Any] = []
    system = _system(body.get("system"))
    if system:
        messages.append({"role": "system", "content": system})
    given = body.get("messages")
    for message in given if isinstance(given, list) else ():
        _add_message(messages, message)
    chat: Chat = {"messages": messages}
    _add_thinking(chat, body)
    tools = body.get("tools")
    if tools is not None:
        chat["tools"] = [_tool(tool) for tool in _list(tools)]
        choice = body.get("tool_choice")
        chat["tool_choice"] = "none" if isinstance(choice, dict) and choice.get("type") == "none" else "auto"
    return chat


def chat_of_response(body: Body) -> Chat:
    """A Responses request as a chat's body, with the fields that its prompt depends on. Raises ChatNotRendered."""
    for name in ("previous_response_id", "previous_input_messages", "prompt"):
        if body.get(name) is not None:
            raise ChatNotRendered(f"only the engine knows what {name} stands for")
    if body.get("truncation") not in (None, "disabled"):
        raise ChatNotRendered("the engine may cut the input")
    messages: list[Any] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    given = body.get("input")
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        for item in _list(given):
            _add_item(messages, item)
        _check_open(_list(given))
    chat: Chat = {"messages": messages}
    reasoning = body.get("reasoning")
    if isinstance(reasoning, dict) and reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    if body.get("chat_template_kwargs") is not None:
        chat["chat_template_kwargs"] = body["chat_template_kwargs"]
    if body.get("tools"):
        chat["tools"] = [_response_tool(tool) for tool in _list(body["tools"])]
        chat["tool_choice"] = body.get("tool_choice", "auto")
    return chat


CHATS: Mapping[str, Callable[[Body], Chat]] = {"messages": chat_of_messages, "responses": chat_of_response}
"""What makes a chat of an endpoint's body."""


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ChatNotRendered("the engine refuses this")
    return value


def _text(block: Mapping[str, Any], name: str = "text") -> str:
    text = block.get(name)
    if not isinstance(text, str):
        raise ChatNotRendered("a content block is malformed")
    return text


def _system(given: object) -> str:
    if given is None or isinstance(given, str):
        return given or ""
    texts = []
    for block in _list(given):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise ChatNotRendered("only the engine handles a system prompt of blocks that are not text")
        text = _text(block)
        if not text.startswith(_BILLING_HEADER):  # which changes with each request of a coding assistant
            texts.append(text)
    return "".join(texts)


def _add_message(messages: list[Any], message: object) -> None:
    if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
        raise ChatNotRendered("where the engine puts a system message among the others depends on the template")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        messages.append({"role": role, "content": content})
        return
    made: Chat = {"role": role}
    texts: list[str] = []
    calls: list[Any] = []
    thoughts: list[str] = []
    for block in _list(content):
        _add_block(messages, block, role, texts, calls, thoughts)
    if thoughts:
        made["reasoning"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    if texts:
        made["content"] = texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]
    if role != "user" or "content" in made:
        messages.append(made)


def _add_block(messages: list[Any], block: Any, role: str, texts: list[str], calls: list[Any], thoughts: list[str]) -> None:
    match block:
        case {"type": "text"}:
            if text := _text(block):
                texts.append(text)
        case {"type": "thinking"}:
            thoughts.append(_text(block, "thinking"))
        case {"type": "redacted_thinking"}:
            pass
        case {"type": "tool_use", "id": str(id), "name": str(name)} if id:
            function = {"name": name, "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": id, "type": "function", "function": function})
        case {"type": "tool_result"} if role == "user":
            id, content = block.get("tool_use_id") or "", _tool_result(block.get("content"))
            messages.append({"role": "tool", "tool_call_id": id, "content": content})
        case _:
            raise ChatNotRendered("only the engine handles content blocks that are not text, thoughts or tools")


def _tool_result(content: object) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in _list(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise ChatNotRendered("only the engine handles tool results that are not text")
        texts.append(_text(part))
    return "\n".join(texts)


def _add_thinking(chat: Chat, body: Body) -> None:
    output, thinking = body.get("output_config"), body.get("thinking")
    if isinstance(output, dict) and output.get("effort") is not None:
        chat["reasoning_effort"] = output["effort"]
    if isinstance(thinking, dict) and thinking.get("type") == "disabled":
        raise ChatNotRendered("the engine tries out what its template calls no thinking")
    if body.get("chat_template_kwargs") is not None:
        chat["chat_template_kwargs"] = body["chat_template_kwargs"]


def _tool(tool: object) -> dict[str, Any]:
    if not isinstance(tool, dict) or not isinstance(tool.get("input_schema"), dict):
        raise ChatNotRendered("the engine refuses these tools")
    schema = tool["input_schema"]
    parameters = schema if "type" in schema else {**schema, "type": "object"}
    named = {name: tool.get(name) for name in ("name", "description", "strict", "defer_loading")}
    return {"type": "function", "function": {**named, "parameters": parameters}}


def _response_tool(tool: object) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise ChatNotRendered("only the engine handles tools that are not functions")
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _add_item(messages: list[Any], item: Any) -> None:
    before = messages[-1] if messages and messages[-1].get("role") == "assistant" else None
    match item:
        case {"type": "function_call", "call_id": str(id), "name": str(name), "arguments": str(arguments)}:
            if item.get("namespace"):
                raise ChatNotRendered("only the engine handles tools in namespaces")
            call = {"id": id, "function": {"name": name, "arguments": arguments}, "type": "function"}
            if before is None:
                messages.append({"role": "assistant", "tool_calls": [call]})
            else:
                before.setdefault("tool_calls", []).append(call)
        case {"type": "function_call_output", "output": str(output)}:
            messages.append({"role": "tool", "content": output, "tool_call_id": item.get("call_id")})
        case {"role": "assistant", "content": str(content)} | {"role": "assistant", "content": [{"text": str(content)}]}:
            if before is None or before.get("content") is not None:
                messages.append({"role": "assistant", "content": content})
            else:
                before["content"] = content
        case {"role": "user" | "system" | "developer", "content": str() | list()}:
            messages.append(item)
        case _:
            raise ChatNotRendered("only the engine handles these items of the input")


def _check_open(items: list[Any]) -> None:
    """Refuse a last message that the engine goes on with. Raises ChatNotRendered."""
    if items and isinstance(items[-1], dict) and items[-1].get("status") in ("in_progress", "incomplete"):
        raise ChatNotRendered("the engine goes on with the last message")
