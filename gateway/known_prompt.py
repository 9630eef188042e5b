"""What is known of a request's prompt: its token ids as the engine will see them, if that can be told."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from gateway.body import Endpoint
from gateway.errors import PromptTooLong
from gateway.parity import Parity, ParityVerdict
from gateway.prompts import depends_on_text, ids_are_the_prompt, reads_no_cache, split_prompts
from gateway.served_models import ServedModels
from gateway.token_ids import TokenIds
from gateway.tokens import NotAtOnce, NoTokenIds, TextTooLong, TokenService
from transport.adapter import adapter_identity

LOOKED_UP_INLINE_CHARS_MAX = 1 << 20
"""More text than this, seen before or not, is looked up in a thread: a million characters take 2 ms."""
PIECES_INLINE_MAX = 256
"""More messages or prompts than that are worked on in a thread: a chat of 256 messages is rendered in 1 ms."""
CHARS_PER_TOKEN = 4
"""Of English text, roughly: for the weight of a prompt whose ids are not known."""


class KnownPrompt(msgspec.Struct, frozen=True, gc=False, eq=False):
    """`ids` steer a request (None: unknown); `sent` replaces the text in the body.

    `certain` says that `ids` are exactly the engine's, `cacheable` that the engine may take any of them from a cache. `tokens`
    is its length, by estimate where the ids are not known. `chat_ids` says that they may stand for a chat's messages.
    """

    ids: TokenIds | None
    sent: Sequence[Any] | None = None
    certain: bool = False
    cacheable: bool = True
    count: int = 1
    tokens: int = 0
    why_unknown: str = ""
    chat_ids: bool = False


class PromptReader:
    """Turns bodies into known prompts. Belongs to the event loop's thread; long prompts are tokenised in another."""

    def __init__(self, tokens: TokenService, inline_chars_max: int, models: Callable[[], ServedModels | None]) -> None:
        self._tokens = tokens
        self._inline_chars_max = inline_chars_max
        self._models = models
        self.parity = ParityVerdict()

    async def read(self, endpoint: Endpoint, body: Mapping[str, Any]) -> KnownPrompt:
        """Return what is known of the prompt. Raises InvalidRequest, PromptTooLong."""
        if endpoint == "embeddings":
            tokens = _characters(body.get("input")) // CHARS_PER_TOKEN
            return KnownPrompt(None, cacheable=False, tokens=tokens, why_unknown="embeddings are computed whole")
        param, read = ("prompt", self._completion) if endpoint == "completions" else ("messages", self._chat)
        given = body.get(param)
        characters = len(given) if type(given) is str else _characters(given)
        if self._may_be_quick(given, characters):
            with contextlib.suppress(NotAtOnce):
                return read(body, characters, self._inline_chars_max)
        return await asyncio.to_thread(read, body, characters, None)

    def _may_be_quick(self, given: object, characters: int) -> bool:
        """Tell whether a prompt or messages are worth an attempt on the event loop."""
        if not isinstance(given, list) or not given:
            return characters <= LOOKED_UP_INLINE_CHARS_MAX
        if isinstance(given[0], int):
            return True
        chars_max = LOOKED_UP_INLINE_CHARS_MAX if isinstance(given[0], dict) else self._inline_chars_max
        return len(given) <= PIECES_INLINE_MAX and characters <= chars_max

    def adapter(self, body: Mapping[str, Any]) -> str:
        """Return the adapter that the request names as the connector spells it, "" for none."""
        models = self._models()
        card = models.cards.get(body.get("model") or "") if models else None
        return adapter_identity(card["id"], card.get("root") or "") if card and card.get("parent") else ""

    def _completion(self, body: Mapping[str, Any], characters: int, new_chars_max: int | None) -> KnownPrompt:
        prompts = split_prompts(body.get("prompt"))
        cacheable = not reads_no_cache(body)

        def unknown(why: str) -> KnownPrompt:
            guess = characters // CHARS_PER_TOKEN
            return KnownPrompt(None, cacheable=cacheable, count=len(prompts), tokens=guess, why_unknown=why)

        if not ids_are_the_prompt(body):
            return unknown("the engine changes the prompt")
        text = isinstance(prompts[0], str)
        certain = not text or self.parity.completions.parity is Parity.EXACT
        special = body.get("add_special_tokens", True)
        try:
            ids = [self._encode(prompt, special, new_chars_max) if isinstance(prompt, str) else prompt for prompt in prompts]
            longest = ids[0] if len(ids) == 1 else max(ids, key=len)
            self._check_length("prompt", len(longest), certain)
        except TextTooLong as long:
            self._check_length("prompt", long.tokens_min, certain)
            return unknown(str(long))
        except NoTokenIds as error:
            return unknown(str(error))
        sent: Sequence[Any] | None = None
        if text and certain and not depends_on_text(body) and all(ids):
            sent = ids[0] if isinstance(body["prompt"], str) else ids
        return KnownPrompt(longest, sent, certain, cacheable, len(prompts), len(longest))

    def _encode(self, prompt: str, special: object, new_chars_max: int | None) -> TokenIds:
        if not isinstance(special, bool):
            raise NoTokenIds("add_special_tokens is malformed")
        return self._tokens.encode(prompt, special, self._context_tokens(), new_chars_max)

    def _chat(self, body: Mapping[str, Any], characters: int, new_chars_max: int | None) -> KnownPrompt:
        cacheable = not reads_no_cache(body)
        guess = characters // CHARS_PER_TOKEN
        parity = self.parity.chat.parity
        if parity is Parity.OFF:
            why = "chats are not tokenised as the engine does"
            return KnownPrompt(None, cacheable=cacheable, tokens=guess, why_unknown=why)
        certain = parity is Parity.EXACT
        try:
            ids = self._tokens.encode_chat(body, self._context_tokens(), new_chars_max)
            self._check_length("messages", len(ids), certain)
        except TextTooLong as long:
            self._check_length("messages", long.tokens_min, certain)
            return KnownPrompt(None, cacheable=cacheable, tokens=guess, why_unknown=str(long))
        except NoTokenIds as unknown:
            return KnownPrompt(None, cacheable=cacheable, tokens=guess, why_unknown=str(unknown))
        chat_ids = certain and not body.get("echo") and len(ids) > 0
        return KnownPrompt(ids, None, certain, cacheable, tokens=len(ids), chat_ids=chat_ids)

    def _context_tokens(self) -> int | None:
        models = self._models()
        known = models.context_tokens if models else None
        return self.parity.context_tokens if known is None else known

    def _check_length(self, param: str, tokens: int, certain: bool) -> None:
        """Refuse what the engine is certain to refuse. Raises PromptTooLong."""
        limit = self._context_tokens()
        if certain and limit is not None and tokens > limit:
            raise PromptTooLong(tokens, limit, param=param)


def _characters(value: object) -> int:
    """Return roughly how many characters of text are in a prompt or a list of messages."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, list):
            if not (item and isinstance(item[0], int)):
                waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return total
