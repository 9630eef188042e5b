"""What is known about a request's prompt: its token ids as the engine will see them, if that can be determined."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from gateway.api.endpoints import ENDPOINTS, Endpoint
from gateway.errors import PromptTooLong
from gateway.prompts.chat.conversation import ChatNotRendered
from gateway.prompts.chat.other_apis import CHATS
from gateway.prompts.chat.request_fields import all_known, ids_suffice
from gateway.prompts.forms import depends_on_text, ids_are_the_prompt, is_plain, reads_no_cache, split_prompts
from gateway.prompts.parity import Parity, ParityCounts, ParityVerdict
from gateway.prompts.tokenizer.service import NotAtOnce, NoTokenIds, TextTooLong, TokenService
from gateway.token_ids import TokenIds
from gateway.upstream.served_models import ServedModels
from transport.lora import adapter_identity

LOOKED_UP_INLINE_CHARS_MAX = 1 << 20
"""Longer text, seen before or not, is looked up in a thread: a million characters take 2 ms."""
PIECES_INLINE_MAX = 256
"""More messages or prompts than this are handled in a thread: rendering a chat of 256 messages takes 1 ms."""
SHORT_CHARS_MAX = 64 << 10
"""Longer prompts have threads of their own: 64 Ki characters take 30 ms."""
SHORT_THREADS = LONG_THREADS = 2
CHARS_PER_TOKEN = 4
"""Roughly that of English text: for the weight of a prompt whose ids are not known."""
MEDIA_TOKENS = 4096
"""The weight of an image and the like, whose address says nothing of its size."""
Result = TypeVar("Result")
_EXACT = Parity.EXACT  # a global is faster than a class attribute
_MADE_HERE = "\0chat"
"""Stands in a chat's body that was made of another API's: no field of anybody, so that its ids are never taken for certain."""
_OF_CHATS = ("messages", "system", "tools", "input", "instructions")


class KnownPrompt(msgspec.Struct, frozen=True, gc=False, eq=False):
    """`ids` steer a request (None: unknown); `sent` replaces the text in the body.

    `certain` says that `ids` are exactly the engine's, `cacheable` that the engine may take any of them from a cache. `tokens`
    is its length, estimated if the ids are not known. `chat_ids` says that they may replace a chat's messages.
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
    """Turns bodies into known prompts. Belongs to the event loop's thread; long prompts are tokenised in another thread."""

    def __init__(self, tokens: TokenService, inline_chars_max: int, models: Callable[[], ServedModels | None]) -> None:
        self._tokens = tokens
        self._inline_chars_max = inline_chars_max
        self._models = models
        self._short = ThreadPoolExecutor(SHORT_THREADS, "short-prompts")
        self._long = ThreadPoolExecutor(LONG_THREADS, "long-prompts")
        self.parity = ParityVerdict()
        """Whether our token ids are the engines', according to the last check of `parity_watch`."""
        self.parity_counts = ParityCounts()

    async def read(self, endpoint: Endpoint, body: Mapping[str, Any], tenant: str = "") -> KnownPrompt:
        """Return what is known about the prompt of a tenant, named by its salt. Raises InvalidRequest, PromptTooLong."""
        if endpoint != "completions" and endpoint != "chat":
            found = _looked_at(endpoint, body)
            if isinstance(found, KnownPrompt):
                return found
            endpoint, body = "chat", found
        param, read = ("prompt", self._completion) if endpoint == "completions" else ("messages", self._chat)
        given = body.get(param)
        characters = len(given) if type(given) is str else characters_in(given)
        if self._may_be_quick(given, characters):
            try:
                return read(body, characters, self._inline_chars_max, tenant)
            except NotAtOnce:
                pass  # but in a thread
        return await self.in_thread(characters, read, body, characters, None, tenant)

    async def in_thread(self, characters: int, work: Callable[..., Result], *given: object) -> Result:
        """Run `work`, which tokenises so many characters. Short prompts never wait for long ones."""
        threads = self._short if characters <= SHORT_CHARS_MAX else self._long
        return await asyncio.get_running_loop().run_in_executor(threads, work, *given)

    def read_here(self, endpoint: Endpoint, body: Mapping[str, Any], tenant: str = "") -> KnownPrompt:
        """As `read`, however long it takes. Raises what that does."""
        if endpoint != "completions" and endpoint != "chat":
            found = _looked_at(endpoint, body)
            if isinstance(found, KnownPrompt):
                return found
            endpoint, body = "chat", found
        given = body.get("prompt" if endpoint == "completions" else "messages")
        read = self._completion if endpoint == "completions" else self._chat
        return read(body, characters_in(given), None, tenant)

    def _may_be_quick(self, given: object, characters: int) -> bool:
        """Tell whether a prompt or messages are short enough for the event loop."""
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

    def _completion(self, body: Mapping[str, Any], characters: int, new_chars_max: int | None, tenant: str) -> KnownPrompt:
        certain = self.parity.completions.parity is _EXACT
        limit = self.context_tokens()
        refused = limit if certain else None  # what is longer is, if we know its length
        prompt = body.get("prompt")
        if type(prompt) is str and is_plain(body):
            try:
                only = self._tokens.encode(prompt, True, limit, new_chars_max, tenant)
            except NoTokenIds as error:
                return self._unknown(error, characters, refused)
            tokens = len(only)
            _check_length("prompt", tokens, refused)
            # vLLM refuses an empty text, whatever ids a tokenizer makes of it.
            return KnownPrompt(only, only if certain and tokens and prompt else None, certain, tokens=tokens)
        prompts = split_prompts(prompt)
        cacheable, count = not reads_no_cache(body), len(prompts)
        if not ids_are_the_prompt(body):
            return self._unknown("the engine changes the prompt", characters, None, cacheable=cacheable, count=count)
        text = isinstance(prompts[0], str)
        if not text:
            certain, refused = True, limit
        special = body.get("add_special_tokens", True)
        try:
            ids = [
                self._encode(prompt, special, limit, new_chars_max, tenant) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
        except NoTokenIds as error:
            return self._unknown(error, characters, refused, cacheable=cacheable, count=count)
        longest = ids[0] if count == 1 else max(ids, key=len)
        _check_length("prompt", len(longest), refused)
        sent: Sequence[Any] | None = None
        if text and certain and not depends_on_text(body) and all(ids) and prompt:
            sent = ids[0] if isinstance(prompt, str) else ids
        return KnownPrompt(longest, sent, certain, cacheable, count, len(longest))

    def _encode(self, prompt: str, special: object, limit: int | None, new_chars_max: int | None, tenant: str) -> TokenIds:
        if not isinstance(special, bool):
            raise NoTokenIds("add_special_tokens is malformed")
        return self._tokens.encode(prompt, special, limit, new_chars_max, tenant)

    def _unknown(
        self,
        why: str | NoTokenIds,
        characters: int,
        refused: int | None,
        param: str = "prompt",
        *,
        cacheable: bool = True,
        count: int = 1,
    ) -> KnownPrompt:
        """Say that the ids are not known. Raises PromptTooLong if that is because they are more than `refused`, if not None."""
        if isinstance(why, TextTooLong):
            _check_length(param, why.tokens_min, refused)
        guess = characters // CHARS_PER_TOKEN
        return KnownPrompt(None, cacheable=cacheable, count=count, tokens=guess, why_unknown=str(why))

    def _chat(self, body: Mapping[str, Any], characters: int, new_chars_max: int | None, tenant: str) -> KnownPrompt:
        cacheable = not reads_no_cache(body)
        parity = self.parity.chat.parity
        if parity is Parity.OFF:
            characters = _characters_of_chat(body, characters)
            return self._unknown("chats are not tokenised as the engine does", characters, None, cacheable=cacheable)
        limit, certain = self.context_tokens(), parity is _EXACT and all_known(body)
        refused = limit if certain else None
        try:
            ids = self._tokens.encode_chat(body, limit, new_chars_max, tenant)
        except NoTokenIds as error:
            characters = _characters_of_chat(body, characters)
            return self._unknown(error, characters, refused, "messages", cacheable=cacheable)
        tokens = len(ids)
        _check_length("messages", tokens, refused)
        chat_ids = certain and tokens > 0 and ids_suffice(body)
        return KnownPrompt(ids, None, certain, cacheable, tokens=tokens, chat_ids=chat_ids)

    def context_tokens(self) -> int | None:
        """Return the engine's longest prompt and answer together, None if it is not known."""
        models = self._models()
        known = models.context_tokens if models else None
        return self.parity.context_tokens if known is None else known


def _looked_at(endpoint: Endpoint, body: Mapping[str, Any]) -> KnownPrompt | dict[str, Any]:
    """The chat that the engine makes of a body, or what is known of a prompt that is not tokenised here."""
    if endpoint in CHATS:
        try:
            return {**CHATS[endpoint](body), _MADE_HERE: None}
        except ChatNotRendered as error:
            told = [body.get(name) for name in _OF_CHATS]
            tokens = characters_in(told) // CHARS_PER_TOKEN + media_in(told) * MEDIA_TOKENS
            return KnownPrompt(None, tokens=tokens, why_unknown=str(error))
    if ENDPOINTS[endpoint].work == "counts":
        return KnownPrompt(None, cacheable=False, why_unknown="nothing is computed")
    if endpoint == "audio":
        return KnownPrompt(None, cacheable=False, why_unknown="only the engine hears audio")
    if endpoint in ("score", "rerank"):
        return _scored(body)
    given = body.get("messages") if body.get("input") is None else body["input"]
    tokens = characters_in(given) // CHARS_PER_TOKEN
    count = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    return KnownPrompt(None, cacheable=False, count=count, tokens=tokens, why_unknown="what is pooled is computed whole")


def _characters_of_chat(body: Mapping[str, Any], characters: int) -> int:
    """To how many characters a chat comes whose messages have so many, with its tools and media."""
    more = [body[name] for name in ("tools", "documents") if body.get(name) is not None]
    return characters + characters_in(more) + media_in(body.get("messages")) * MEDIA_TOKENS * CHARS_PER_TOKEN


def _scored(body: Mapping[str, Any]) -> KnownPrompt:
    """Each of the first texts goes with each of the second ones, or with the one in its place."""
    first = next((body[name] for name in ("query", "queries", "text_1", "data_1") if name in body), None)
    second = next((body[name] for name in ("documents", "items", "text_2", "data_2") if name in body), None)
    ones, others = (len(value) if isinstance(value, list) else 1 for value in (first, second))
    pairs = max(1, ones, others)
    characters = characters_in(first) * -(-pairs // max(1, ones)) + characters_in(second) * -(-pairs // max(1, others))
    tokens = characters // CHARS_PER_TOKEN
    return KnownPrompt(None, cacheable=False, count=pairs, tokens=tokens, why_unknown="what is scored is computed whole")


def _check_length(param: str, tokens: int, refused: int | None) -> None:
    """Refuse what the engine would certainly refuse: more than `refused` tokens, if not None. Raises PromptTooLong."""
    if refused is not None and tokens > refused:
        raise PromptTooLong(tokens, refused, param=param)


def characters_in(value: object) -> int:
    """Return the approximate number of characters in a prompt or a list of messages."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            # A character of several bytes may be as many tokens.
            total += len(item) if item.isascii() else len(item.encode("utf-8", "surrogatepass"))
        elif isinstance(item, list):
            if item and isinstance(item[0], int):
                total += len(item) * CHARS_PER_TOKEN
            else:
                waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item.values())
    return total


def media_in(value: object) -> int:
    """Return how many images, recordings and the like are in a list of messages, at any depth."""
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            kind = item.get("type")
            total += isinstance(kind, str) and any(word in kind for word in ("image", "audio", "video", "file"))
            waiting.extend(each for each in (item.get("content"), item.get("output")) if isinstance(each, list | dict))
    return total
