"""Prompts that are tokenised here and by an engine, to see whether the ids agree."""

from collections.abc import Mapping
from typing import Any

COMPLETIONS: Mapping[str, str] = {
    "sentence": "The capital of France is",
    "leading space": "  two leading spaces, and a tab\there",
    "lines": "first line\nsecond line\r\n\r\n\n    indented\n",
    "accents": "Grüße aus Zürich — “naïve” façade, ﬁn. Å vs. A\u030a",
    "scripts": "日本語のテキスト 한국어 русский العربية हिन्दी ไทย",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭 ✅",
    "digits": "3.14159 1234567890 0x1F 1e-9 ½ ²",
    "code": "def f(x):\n    return {k: v for k, v in x.items() if v != '</s>'}  # <|im_end|> <s>",
    "markers": "<|im_start|>user <|endoftext|> [INST] </s> <bos> <unk> <pad>",
    "odd": "a\u200bb\u00a0c\ufeffd \x7f e",
}

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather of a place: “now”.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
_SECOND_CALL = {"id": "call_000000002", "type": "function", "function": {"name": "weather", "arguments": '{"place":"Genève"}'}}
_CALL = {"id": "call_000000001", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}

CHATS: Mapping[str, Mapping[str, Any]] = {
    "one turn": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "system prompt": {
        "messages": [
            {"role": "system", "content": "  You answer in one word.\n"},
            {"role": "user", "content": "Hauptstadt der Schweiz? 🇨🇭"},
        ]
    },
    "several turns": {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Grüezi! 日本語も話せます。"},
            {"role": "user", "content": "line one\n\nline two  "},
        ]
    },
    "content parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "text", "text": "second"}]}]
    },
    "long conversation": {
        "messages": [
            {"role": "system", "content": "Be brief. Réponds en français s'il le faut. 🦜"},
            {"role": "user", "content": "一二三 — what comes next?"},
            {"role": "assistant", "content": "四, 五 … and so on."},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "  \n\n(nothing was said)\n"},
            {"role": "user", "content": "<|im_end|> is not the end 🇨🇭\t."},
        ]
    },
    "no generation prompt": {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False},
    "open answer": {
        "messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}],
        "add_generation_prompt": False,
        "continue_final_message": True,
    },
}

TOOL_CHATS: Mapping[str, Mapping[str, Any]] = {
    "tools": {"messages": [{"role": "user", "content": "How is the weather in Zürich?"}], "tools": [_TOOL]},
    "tool result": {
        "messages": [
            {"role": "user", "content": "How is the weather in Zürich?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_000000001", "name": "weather", "content": '{"sky": "clear"}'},
        ],
        "tools": [_TOOL],
    },
    "tools in several turns": {
        "messages": [
            {"role": "system", "content": "You may look at the sky — or not."},
            {"role": "user", "content": "天気は Zürich *and* Genève"},
            {"role": "assistant", "content": "I look twice.", "tool_calls": [_CALL, _SECOND_CALL]},
            {"role": "tool", "tool_call_id": "call_000000001", "name": "weather", "content": '{"sky": "☀️"}'},
            {"role": "tool", "tool_call_id": "call_000000002", "name": "weather", "content": "brouillard"},
            {"role": "assistant", "content": "☀️ in Zürich, fog in Genève."},
            {"role": "user", "content": "Thanks!"},
        ],
        "tools": [_TOOL],
    },
}

ANSWERED_CHATS: Mapping[str, Mapping[str, Any]] = {
    "answered": {"messages": [{"role": "user", "content": "Good morning!"}]},
    "effort and documents": {
        "messages": [{"role": "user", "content": "What is on the list?"}],
        "reasoning_effort": "low",
        "documents": [{"title": "List", "text": "Bread, “Züpfe”."}],
    },
    "reasoning": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?", "name": "ann"},
            {"role": "assistant", "content": "2", "reasoning_content": "One more than one."},
            {"role": "user", "content": "And 2 + 2?"},
        ],
    },
}
"""Chats with fields that /tokenize does not know, or whose way through the engine is another one than there."""

ANSWERED_TOOL_CHATS: Mapping[str, Mapping[str, Any]] = {
    "tools not to be chosen": {
        "messages": [{"role": "user", "content": "How is the weather in Zürich?"}],
        "tools": [_TOOL],
        "tool_choice": "none",
    },
}
"""As well, where the template takes tools: --exclude-tools-when-tool-choice-none."""
