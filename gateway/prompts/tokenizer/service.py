"""Token ids of prompts, the same ones that the engine computes from the same text.

Follows transformers' TokenizersBackend (5.x), which vLLM uses: tokenizer.json without its truncation and padding, with its
post-processor (add_bos_token in the config does not count beside it), and with special tokens that its vocabulary lacks. Some
models' classes change more than that: gateway/prompts/parity.py compares the result with the engine's once per start.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gateway.prompts.chat.template import ChatNotRendered, ChatTemplate
from gateway.prompts.tokenizer.encoder import TEXTS_BYTES_MAX, EncoderMaker, TooManyTokens
from gateway.prompts.tokenizer.model_files import (
    ModelFiles,
    ModelFilesError,
    TokenizerSource,
    read_model_files,
    renderer_of_its_own,
    token_text,
)
from gateway.prompts.tokenizer.tenant_encoders import TenantEncoders, freeze_words
from gateway.token_ids import TokenIds

_logger = logging.getLogger(__name__)

CACHE_BYTES_MAX = 128 << 20
CHARACTER_TOKENS_MAX = 8
"""Tokens at the end of some text that tell whether it ends within a character: one has four bytes at most."""


class NoTokenIds(Exception):
    """The token ids of this request are not known here, and the message says why: steer it without them."""


class TextTooLong(NoTokenIds):
    """The text has more than `tokens_max` tokens, however it is cut up: at least `tokens_min`."""

    def __init__(self, tokens_min: int, tokens_max: int) -> None:
        super().__init__(f"a text of at least {tokens_min} tokens")
        self.tokens_min = tokens_min
        self.tokens_max = tokens_max


@dataclass(frozen=True, slots=True)
class TokenizerStats:
    """Whether prompts are tokenised in the gateway. `reason` and `chat_reason` say why not, "" when they are."""

    loaded: bool
    chat: bool
    directory: str
    reason: str
    chat_reason: str


class NotAtOnce(Exception):
    """So much of the text was never seen before that tokenising it takes a while: do it where nobody waits."""


class TokenService:
    """Tokenises prompts and chats for one model. Its methods may be called from several threads.

    Of what it has seen it remembers for each tenant apart, named by its salt; `tenants` says how many there are, 0 where nobody
    needs a key.

    The files may not be there yet when the service is made (an engine is still fetching the model): `load` is called again
    when a replica is ready. Until then every request raises NoTokenIds.
    """

    def __init__(
        self,
        source: TokenizerSource,
        cache_bytes_max: int = CACHE_BYTES_MAX,
        texts_bytes_max: int = TEXTS_BYTES_MAX,
        tenants: Callable[[], int] = lambda: 0,
    ) -> None:
        self._source = source
        self._cache_bytes_max = cache_bytes_max
        self._texts_bytes_max = texts_bytes_max
        self._tenants = tenants
        self._encoders: TenantEncoders | None = None
        self._decoder: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._chars_per_token_max = 1
        self.state = TokenizerStats(False, False, "", "not loaded yet", "not loaded yet")

    def load(self) -> TokenizerStats:
        """Read the model's files unless that has been done; say what came of it. Takes 0.1 to 2 s; never raises."""
        if self.state.loaded:
            return self.state
        try:
            self._load()
        except ModelFilesError as error:
            self.state = TokenizerStats(False, False, "", str(error), str(error))
            _logger.warning("prompts are not tokenised here, steering goes by load alone: %s", error)
        return self.state

    def _load(self) -> None:
        if self._source.mode not in ("auto", "hf"):
            raise ModelFilesError(f"the engine's tokenizer mode is {self._source.mode}")
        if self._source.unlike:
            raise ModelFilesError(self._source.unlike)
        files = read_model_files(self._source)
        tokenizer = load_tokenizer(files)
        self._chars_per_token_max = max(map(len, tokenizer.get_vocab()), default=1)
        chat_reason = ""
        try:
            if other := renderer_of_its_own(self._source):
                raise ChatNotRendered(other)
            self._template = ChatTemplate(
                files.templates,
                files.special_tokens,
                self._source.chat_template_kwargs,
                self._source.content_format,
                exclude_tools=self._source.exclude_tools,
            )
        except ChatNotRendered as error:
            chat_reason = str(error)
            _logger.warning("chats are steered by load alone: %s", error)
        try:
            make = EncoderMaker(tokenizer)
            sizes, freeze = (self._cache_bytes_max, self._texts_bytes_max), partial(freeze_words, tokenizer)
            self._encoders = TenantEncoders(make, self._tenants, *sizes, freeze)
        except Exception as error:  # the tokenizers library raises the bare class: no unknown token where one is needed, say
            raise ModelFilesError(f"{files.tokenizer}: {error}") from error
        self._decoder = tokenizer
        self.state = TokenizerStats(True, self._template is not None, str(files.directory), "", chat_reason)

    @property
    def chat_takes_tools(self) -> bool:
        """Whether the model's chat template looks at tools."""
        return self._template is not None and self._template.takes_tools

    def ends_whole(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids` is known to end with a whole character, and the last of them to have a part in it."""
        if self._decoder is None or not self._decoder.decode([ids[-1]], skip_special_tokens=True):
            return False
        return not self._decoder.decode(list(ids[-CHARACTER_TOKENS_MAX:]), skip_special_tokens=False).endswith("\ufffd")

    def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        tokens_max: int | None = None,
        new_chars_max: int | None = None,
        tenant: str = "",
    ) -> TokenIds:
        """Return the ids of `text`; `add_special_tokens` adds BOS and the like, as a completion does.

        Raises NoTokenIds; TextTooLong when the text does not fit into `tokens_max`, with no more work than shows it; and
        NotAtOnce, with no more than looking it up, when more than `new_chars_max` of its characters have to be tokenised.
        """
        if self._encoders is None:
            raise NoTokenIds(self.state.reason)
        if tokens_max is not None and len(text) > tokens_max * self._chars_per_token_max:
            raise TextTooLong(-(-len(text) // self._chars_per_token_max), tokens_max)
        try:
            ids = self._encoders.of(tenant).encode(text, add_special_tokens, new_chars_max, tokens_max)
        except UnicodeEncodeError as error:
            raise NoTokenIds("the text holds half a surrogate pair") from error
        except TooManyTokens as error:
            raise TextTooLong(error.tokens, error.tokens_max) from error
        if ids is None:
            raise NotAtOnce
        return ids

    def encode_chat(
        self, body: Mapping[str, Any], tokens_max: int | None = None, new_chars_max: int | None = None, tenant: str = ""
    ) -> TokenIds:
        """Return the ids of a chat request's body. Raises what `encode` does."""
        if self._template is None:
            raise NoTokenIds(self.state.chat_reason)
        special = body.get("add_special_tokens", False)
        if not isinstance(special, bool):
            raise NoTokenIds("add_special_tokens is malformed")
        try:
            text = self._template.render(body)
        except ChatNotRendered as error:
            raise NoTokenIds(str(error)) from error
        return self.encode(text, special, tokens_max, new_chars_max, tenant)


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Return the tokenizer of `files` as the engine sets it up. Raises ModelFilesError if tokenizer.json is not usable."""
    try:
        tokenizer = Tokenizer.from_file(str(files.tokenizer))
    except Exception as error:  # the tokenizers library raises the bare class, whatever is wrong
        raise ModelFilesError(f"{files.tokenizer}: {error}") from error
    padding = tokenizer.padding or {}
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(files.config.get("split_special_tokens", False))
    named = {"pad_token": padding.get("pad_token", ""), **files.special_tokens}
    _add_special_tokens(tokenizer, list(named.values()), files)
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, named: list[str], files: ModelFiles) -> None:
    for field in ("additional_special_tokens", "extra_special_tokens"):
        entries = files.config.get(field) or []
        named += [token_text(entry) for entry in (entries.values() if isinstance(entries, dict) else entries)]
    missing = [text for text in dict.fromkeys(named) if text and tokenizer.token_to_id(text) is None]
    if missing:
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in missing])
