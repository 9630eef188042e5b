"""The rest of a stream that another engine makes from the tokens that were sent, which were part of its prompt."""

from __future__ import annotations

from typing import Any

from gateway.continuation.events import Diverged
from gateway.continuation.rest import RestOfStream
from gateway.continuation.tape import Cut
from gateway.continuation.terms import Terms


class Resumed(RestOfStream):
    """The rest of one stream.

    `prompt_tokens` and `cached_tokens` are those of the first attempt, the latter None where they are not known.
    """

    def __init__(self, cut: Cut, terms: Terms, prompt_tokens: int, cached_tokens: int | None) -> None:
        super().__init__(cut.id, cut.created, usage_sent=cut.usage_sent)
        self._kept = len(cut.kept)
        self._terms = terms
        self._again = list(reversed(cut.again))
        self._characters = cut.characters
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = cached_tokens

    def _is_news(self, choice: dict[str, Any]) -> bool:
        ids: list[int] = choice.get("token_ids") or []
        known = 0
        while known < len(ids) and self._again:
            if ids[known] != self._again.pop():
                raise Diverged("another token than before")
            known += 1
        place, name = (choice["delta"], "content") if self._terms.chat else (choice, "text")
        text = place.get(name) or ""
        skipped = min(len(text), self._characters)
        self._characters -= skipped
        if self._terms.chat and (place.get("tool_calls") or place.get("reasoning")):
            raise Diverged("something else than text")
        ended = choice.get("finish_reason") is not None
        if ended and (self._again or self._characters):
            raise Diverged("an earlier end")
        if self._terms.chat and "role" in place:
            del place["role"]
        if not ended and len(ids) == known and skipped == len(text):
            return False
        if text or not self._terms.chat:
            place[name] = text[skipped:]
        choice["token_ids"] = ids[known:] if self._terms.wants_ids else None
        if "prompt_token_ids" in choice:
            choice["prompt_token_ids"] = None
        return True

    def _correct(self, event: dict[str, Any]) -> None:
        if "prompt_token_ids" in event:
            event["prompt_token_ids"] = None
        if isinstance(event.get("usage"), dict):
            self._correct_usage(event["usage"])

    def _correct_usage(self, usage: dict[str, Any]) -> None:
        """Count what was part of the second prompt as what it is: completion tokens."""
        usage["prompt_tokens"] = self._prompt_tokens
        usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._kept
        usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and details.get("cached_tokens") is not None:
            cached = details["cached_tokens"] if self._cached_tokens is None else self._cached_tokens
            details["cached_tokens"] = min(cached, self._prompt_tokens)
