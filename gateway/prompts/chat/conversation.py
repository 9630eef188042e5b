"""A request's messages and tools in the form that vLLM hands to a chat template.

Follows ChatCompletionRequest's validation (which reorders the keys of tool calls and tools, and a template may print them)
and `_parse_chat_message_content`, `_postprocess_messages` in vllm/renderers/chat_utils.py (0.32).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gateway.prompts.chat.content_format import ContentFormat

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
_CARRIED = frozenset(("cache_control",))
"""Further fields of a part that a template gets to see as they are; clients of other APIs send this one."""
_BILLING_HEADER = "x-anthropic-billing-header"
Message = dict[str, Any]


class ChatNotRendered(Exception):
    """This chat request's token ids are not known here; the message says why."""


def conversation(messages: object, content_format: ContentFormat, knows_developer: bool) -> list[Message]:
    """Return the messages for the template. `messages` is left as it is. Raises ChatNotRendered."""
    if not isinstance(messages, list) or not messages:
        raise ChatNotRendered("there are no messages")
    ready = [_message(message, content_format) for message in messages]
    if not knows_developer and any(message["role"] == "developer" for message in ready):
        return _one_system_message([_as_system(message) for message in ready])
    return ready


def conversation_tools(tools: object) -> list[dict[str, Any]] | None:
    """Return the request's tools as vLLM writes them out again. Raises ChatNotRendered if they are malformed."""
    if tools is None:
        return None
    if not isinstance(tools, list) or not tools:
        raise ChatNotRendered("the engine refuses these tools")
    return [_tool(tool) for tool in tools]


def _tool(tool: object) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatNotRendered("the engine refuses these tools")
    flags = (function.get("strict"), function.get("defer_loading"), tool.get("defer_loading"))
    if not all(flag is None or isinstance(flag, bool) for flag in flags):
        raise ChatNotRendered("the engine may read these tools in another way")
    written: dict[str, Any] = {name: function.get(name) for name in ("name", "description", "parameters")}
    deferred = tool.get("defer_loading")
    extra = {"strict": function.get("strict"), "defer_loading": function.get("defer_loading", deferred)}
    written.update({name: value for name, value in extra.items() if value is not None})
    outer: dict[str, Any] = {"type": tool.get("type", "function"), "function": written}
    return outer if deferred is None else outer | {"defer_loading": deferred}


def _message(message: object, content_format: ContentFormat) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ChatNotRendered("a message is malformed")
    role = message["role"]
    ready: Message = {"role": role, "content": _content(role, message.get("content"), content_format)}
    if role == "assistant":
        _add_assistant_fields(ready, message)
    elif role == "tool":
        if "tool_call_id" in message:
            ready["tool_call_id"] = message["tool_call_id"]
        if isinstance(ready["content"], list):
            ready["content"] = "\n".join(part["text"] for part in ready["content"])
    for name in ("name", "task"):
        if isinstance(message.get(name), str):
            ready[name] = message[name]
    if role == "developer":
        ready["tools"] = message.get("tools")
    return ready


def _content(role: str, content: object, content_format: ContentFormat) -> str | list[dict[str, Any]]:
    if isinstance(content, str) and role != "system":  # as in nearly all requests
        return [{"type": "text", "text": content}] if content_format == "openai" else content
    if content is None:
        parts: list[Any] = []
    elif isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = content
    else:
        raise ChatNotRendered("a message's content is malformed")
    if role == "system":
        parts = [kept for part in parts if (kept := _without_billing_header(part)) is not None]
    if content_format == "openai":
        return [_wrapped(part) for part in parts]
    return "\n".join(text for text in map(_part_text, parts) if text)


def _wrapped(part: object) -> dict[str, Any]:
    """Return a content part as a template that loops over parts gets it. Raises ChatNotRendered."""
    ready = {"type": "text", "text": _part_text(part)}
    if isinstance(part, dict) and len(part) > len(ready):
        if part.keys() - {"type", _TEXT_PARTS[part["type"]]} - _CARRIED:
            raise ChatNotRendered("a content part with fields of its own is the engine's business")
        ready.update({name: part[name] for name in part if name in _CARRIED})
    return ready


def _part_text(part: object) -> str:
    """Return the text of a content part. Raises ChatNotRendered for media, and for what the engine refuses."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str) or kind not in _TEXT_PARTS or "uuid" in part:
        raise ChatNotRendered("only the engine handles content parts that are not text")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise ChatNotRendered("a content part is malformed")
    return text


def _without_billing_header(part: Any) -> Any:
    """Drop the line by which a coding assistant's client is billed, for it changes with each request; None if that was all."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str) or not text.startswith(_BILLING_HEADER):
        return part
    rest = text.partition("\n")[2]
    return {**part, "text": rest} if rest else None


def _add_assistant_fields(ready: Message, message: Mapping[str, Any]) -> None:
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise ChatNotRendered("tool_calls are malformed")
        if calls:
            ready["tool_calls"] = [_tool_call(call) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        ready["reasoning"] = ready["reasoning_content"] = reasoning


def _tool_call(call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or call.get("type", "function") != "function":
        raise ChatNotRendered("tool_calls are malformed")
    written = _ordered(function, ("arguments", "name"))
    written["arguments"] = _arguments(function.get("arguments"))
    return _ordered({**call, "function": written}, ("id", "function", "type"))


def _arguments(given: object) -> dict[str, Any]:
    """Templates want an object; what is none becomes an empty one, so that a broken call does not spoil all later turns."""
    if isinstance(given, str) and given:
        try:
            given = json.loads(given)
        except ValueError:
            return {}
    return dict(given) if isinstance(given, dict) else {}


def _ordered(given: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    return {name: given[name] for name in first if name in given} | {
        name: value for name, value in given.items() if name not in first
    }


def _as_system(message: Message) -> Message:
    if message["role"] != "developer":
        return message
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _one_system_message(messages: list[Message]) -> list[Message]:
    """Merge all system messages into one at the front, where some templates insist to have it."""
    system = [message for message in messages if message["role"] == "system"]
    if len(system) < 2 and (not system or messages[0] is system[0]):
        return messages
    texts = [
        content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        for content in (message["content"] for message in system)
    ]
    rest = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(text for text in texts if text)}, *rest]
