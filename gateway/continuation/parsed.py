"""Chats whose text the engine parses, for tool calls or reasoning: another engine makes the whole answer anew, from the same
prompt, and the client gets what it does not have.

A parser's state cannot be handed on, and it may keep text back. So nothing is put behind the prompt here; greedy answers are
the same, which is checked for all that was sent.
"""

from __future__ import annotations

from typing import Any

from gateway.continuation.events import Diverged
from gateway.continuation.rest import RestOfStream


class Sent:
    """What the deltas of a chat came to: `texts` by the name of the field, and `calls` by their index."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.calls: dict[int, dict[str, str]] = {}

    def add(self, delta: dict[str, Any]) -> None:
        """A delta was sent. Raises TypeError, KeyError, AttributeError for one of another form."""
        for name, value in _texts(delta):
            self.texts[name] = self.texts.get(name, "") + value
        for call in delta.get("tool_calls") or ():
            known = self.calls.setdefault(call["index"], {})
            for name, value in _parts_of(call):
                known[name] = known.get(name, "") + value


class Replayed(RestOfStream):
    """The rest of a stream of which `sent` was sent under `id`; `cached_tokens` are those of the first attempt, if known.

    `end_sent` says that the client was told why it ended, `usage_sent` that it got the usage.
    """

    def __init__(
        self, sent: Sent, id: str, created: int, *, end_sent: bool, usage_sent: bool, cached_tokens: int | None
    ) -> None:
        super().__init__(id, created, usage_sent=usage_sent)
        self._texts = dict(sent.texts)
        self._calls = {index: dict(parts) for index, parts in sent.calls.items()}
        self._end_sent = end_sent
        self._cached_tokens = cached_tokens

    def _correct(self, event: dict[str, Any]) -> None:
        details = (event.get("usage") or {}).get("prompt_tokens_details")
        if details and self._cached_tokens is not None:
            details["cached_tokens"] = self._cached_tokens

    def _is_news(self, choice: dict[str, Any]) -> bool:
        delta, ended = choice["delta"], choice.get("finish_reason") is not None
        delta.pop("role", None)
        news = False
        for name, value in _texts(delta):
            delta[name] = self._rest(self._texts, name, value)
            news = news or delta[name] != ""
        if delta.get("tool_calls"):
            delta["tool_calls"] = [call for call in delta["tool_calls"] if self._is_news_of_call(call)]
            news = news or bool(delta["tool_calls"])
            if not delta["tool_calls"]:
                del delta["tool_calls"]
        if ended and (any(self._texts.values()) or any(any(parts.values()) for parts in self._calls.values())):
            raise Diverged("an earlier end")
        if news and self._end_sent:
            raise Diverged("a later end")
        return news or (ended and not self._end_sent)

    def _is_news_of_call(self, call: dict[str, Any]) -> bool:
        known = self._calls.get(call["index"])
        if known is None:
            return True
        function = call.get("function") or {}
        if known.pop("id", "") and "id" in call:  # each engine makes up its own
            call.pop("id")
            call.pop("type", None)
        news = False
        for name, value in list(function.items()):
            if isinstance(value, str):
                function[name] = self._rest(known, name, value)
                if function[name]:
                    news = True
                elif name != "arguments":
                    del function[name]
        return news or "id" in call

    def _rest(self, known: dict[str, str], name: str, value: str) -> str:
        """What is new of a text of which the client has a beginning. Raises Diverged."""
        had = known.get(name, "")
        both = min(len(had), len(value))
        if had[:both] != value[:both]:
            raise Diverged("another text than before")
        known[name] = had[both:]
        return value[both:]


def _texts(delta: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in delta.items() if name != "role" and isinstance(value, str)]


def _parts_of(call: dict[str, Any]) -> list[tuple[str, str]]:
    parts = [("id", call.get("id")), *(call.get("function") or {}).items()]
    return [(name, value) for name, value in parts if isinstance(value, str)]
