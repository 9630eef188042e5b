"""From text to token ids; parts that were seen before are looked up instead of computed again."""

import hashlib
import logging
from collections.abc import Sequence

from tokenizers import Tokenizer

from gateway.prompts.tokenizer.id_cache import IdCache
from gateway.prompts.tokenizer.known_prefixes import KEY_CHARS, KnownPrefixes
from gateway.prompts.tokenizer.text_cuts import CHUNK_CHARS_MIN, TextCuts, find_cuts
from gateway.prompts.tokenizer.word_ids import WordIds
from gateway.token_ids import TokenIds

_logger = logging.getLogger(__name__)

SHORT_CHARS_MAX = 2 * CHUNK_CHARS_MIN
"""A shorter text, or what follows a text's known prefixes, is assembled from pieces."""
PIECE_CHARS_MIN = 128
"""Size of the pieces of new text; new pieces are assembled from their words."""
PIECED_CHARS_MAX = 8192
"""A longer new text is mostly new: its words would only fill the cache."""
TEXTS_BYTES_MAX = 64 << 20
"""Texts found by comparison: an eighth is for words, the rest for prefixes."""
FEW = 4
"""Up to this many short texts are tokenised one by one; only beyond that does it pay to wake other cores."""
FEW_CHARS_MAX = 1024

GROUP_CHARS = 256 << 10
"""So much of a long text is tokenised before it is asked whether that is too much already."""

_CANARIES = (
    "The first line\nSecond line of it.\n\nThird, after an empty one\nfourth: \n  indented \n\tFifth\r\nSixth\n",
    "I'll say it's HIS'LL we'Ve don'T\nTHEY'RE 12345 67 8\n9 a1b2 3c\nD4\n",
    "a  b   c\td \n\n \n e\u00a0f\u3000g\u2028h\nI \x00\x1c\x85j k\ufeffl\nm",
    "\u4e2d\u6587\u7684\u4e00\u884c\u3002\n\u7b2c\u4e8c\u884c\uff01\n\u304b\u3099\u306a\n\ud55c\uad6d\uc5b4\n\u1112\u1161\n",
    "e\u0301\nA\u0308 o\nAngstrom \u212b\nfi\ufb01n ne\nI\u0307 \u0130\n\U0001f600\nSmile \U0001f468\u200d\U0001f469 family",
    'def f(x):\n    return {"k": [1, 2.5e-3], "v": "w x y"}  # z\nclass C:\n\tpass\n#!/bin/sh\nif [ "$a" ]; then b; fi\n',
    "\u2581under \u2581 the\u2581line\n\u2581x y z!?\nW...\nX<y> <z\n|a| b\n",
)


class TooManyTokens(Exception):
    """A text has more than `tokens_max` tokens: at least `tokens`."""

    def __init__(self, tokens: int, tokens_max: int) -> None:
        super().__init__(f"at least {tokens} tokens, more than {tokens_max}")
        self.tokens, self.tokens_max = tokens, tokens_max


class Encoder:
    """Gives a tokenizer's ids of texts. Thread safe.

    `cuts` say where texts may be cut; None: every text is looked up and tokenised as a whole. `affixes` are the ids of special
    tokens before and behind a text; None: not known to be the same for all texts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        cache: IdCache,
        cuts: TextCuts | None,
        affixes: tuple[TokenIds, TokenIds] | None,
        texts_bytes_max: int = TEXTS_BYTES_MAX,
    ) -> None:
        self._tokenizer = tokenizer
        self._cache = cache
        self._cuts = cuts
        self._affixes = affixes
        self._framed = affixes is None or any(map(len, affixes))
        self._pieces = cuts.sized(PIECE_CHARS_MIN).chunks if cuts is not None else lambda text: [text]
        self._words = WordIds(self._tokenise, cuts.places.words if cuts is not None else "", texts_bytes_max // 8)
        self._prefixes = KnownPrefixes(self._of_words, cuts, texts_bytes_max * 7 // 8) if cuts is not None else None

    def encode(
        self, text: str, add_special_tokens: bool, new_chars_max: int | None = None, tokens_max: int | None = None
    ) -> TokenIds | None:
        """Return the ids of `text`; None, without any work, if more than `new_chars_max` characters have to be tokenised.

        `add_special_tokens` adds BOS and the like. A text that may be cut is tokenised no further than `tokens_max` tokens and
        GROUP_CHARS characters: what is longer raises TooManyTokens. Raises UnicodeEncodeError for half a surrogate pair.
        """
        if not (add_special_tokens and self._framed):
            return self._plain(text, new_chars_max, tokens_max)
        if self._affixes is None:
            return self._parts([text], True, new_chars_max)
        ids = self._plain(text, new_chars_max, tokens_max)
        before, behind = self._affixes
        return None if ids is None else TokenIds.joined([before, ids, behind])

    def _plain(self, text: str, new_chars_max: int | None, tokens_max: int | None) -> TokenIds | None:
        if self._cuts is None or self._prefixes is None:
            return self._parts([text], False, new_chars_max)
        start, known = self._prefixes.leading(text)
        if start:
            text = text[start:]
        if len(text) <= SHORT_CHARS_MAX:
            pieces = [text] if len(text) <= 2 * PIECE_CHARS_MIN else self._pieces(text)
            raw = self._words.raw(pieces, new_chars_max)
            if raw is None:
                return None
            if len(text) > KEY_CHARS:
                self._prefixes.note(text)
            known.append(TokenIds(raw))
            return TokenIds.joined(known)
        chunks = self._cuts.chunks(text)
        if new_chars_max is None and len(text) > GROUP_CHARS:
            ids: list[TokenIds] | None = self._grouped(sum(map(len, known)), chunks, tokens_max)
        else:
            ids = self._each(chunks, False, new_chars_max)
        if ids is None:
            return None
        self._prefixes.note(text, chunks, ids)
        return TokenIds.joined([*known, *ids])

    def _grouped(self, tokens: int, chunks: list[str], tokens_max: int | None) -> list[TokenIds]:
        """Return the ids of chunks that follow `tokens` tokens, tokenised group by group. Raises TooManyTokens."""
        found: list[TokenIds] = []
        first = chars = 0
        for place, chunk in enumerate(chunks, 1):
            chars += len(chunk)
            if chars < GROUP_CHARS and place < len(chunks):
                continue
            ids = self._each(chunks[first:place], False, None) or []
            found += ids
            tokens += sum(map(len, ids))
            if tokens_max is not None and tokens > tokens_max:
                raise TooManyTokens(tokens, tokens_max)
            first, chars = place, 0
        return found

    def _of_words(self, text: str) -> bytes:
        return self._words.raw(self._pieces(text)) or b""

    def _parts(self, texts: list[str], special: bool, new_chars_max: int | None) -> TokenIds | None:
        ids = self._each(texts, special, new_chars_max)
        return None if ids is None else TokenIds.joined(ids)

    def _each(self, texts: list[str], special: bool, new_chars_max: int | None) -> list[TokenIds] | None:
        """Return the ids of each text; None, without any work, if more than `new_chars_max` characters are new."""
        sha256, kind = hashlib.sha256, b"\1" if special else b""
        keys = [sha256(text.encode()).digest() + kind for text in texts]
        parts = self._cache.get(keys)
        new = {key: text for key, text, ids in zip(keys, texts, parts, strict=True) if ids is None}
        if new:
            if new_chars_max is not None and sum(map(len, new.values())) > new_chars_max:
                return None
            fresh = dict(zip(new, self._fresh(list(new.values()), special), strict=True))
            self._cache.put(fresh.items())
            parts = [fresh[key] if ids is None else ids for key, ids in zip(keys, parts, strict=True)]
        return [part for part in parts if part is not None]

    def _fresh(self, texts: list[str], special: bool) -> list[TokenIds]:
        """Tokenise texts that are not known as a whole. If they are few, known pieces of a line or less are looked up."""
        if special or self._cuts is None or sum(map(len, texts)) > PIECED_CHARS_MAX:
            return self._tokenise(texts, special)
        return [TokenIds(self._of_words(text)) for text in texts]

    def _tokenise(self, texts: list[str], special: bool = False) -> list[TokenIds]:
        return encode_all(self._tokenizer, texts, special)


def encode_all(tokenizer: Tokenizer, texts: list[str], special: bool) -> list[TokenIds]:
    """Return the ids of each text."""
    # The fast batch form skips character offsets, leaves the interpreter lock to others meanwhile, and uses several cores.
    if 1 < len(texts) <= FEW and sum(map(len, texts)) <= FEW_CHARS_MAX:
        return [ids for text in texts for ids in encode_all(tokenizer, [text], special)]
    return [TokenIds.of(found.ids) for found in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


class EncoderMaker:
    """Makes encoders for a tokenizer, all alike: what is worked out once is how it can be used.

    They cut texts if that is exact, by what is known of this kind of tokenizer and by a trial.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._affixes = find_affixes(tokenizer)
        self._cuts = find_cuts(tokenizer)
        if self._cuts is not None and not cuts_are_exact(tokenizer, self._cuts):
            _logger.error(
                "texts are tokenised as a whole: cutting them would change some token ids (please report this tokenizer)"
            )
            self._cuts = None

    def __call__(self, cache_bytes_max: int, texts_bytes_max: int = TEXTS_BYTES_MAX) -> Encoder:
        """Return one that keeps so many bytes of ids and of texts."""
        return Encoder(self._tokenizer, IdCache(cache_bytes_max), self._cuts, self._affixes, texts_bytes_max)


def find_affixes(tokenizer: Tokenizer) -> tuple[TokenIds, TokenIds] | None:
    """Return the ids of the special tokens before and after every text, None if they vary."""
    plain, full = (encode_all(tokenizer, [*_CANARIES, ""], special) for special in (False, True))
    bare, whole = plain[0].tolist(), full[0].tolist()
    at = next((at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare), None)
    if at is None:
        return None
    before, behind = full[0][:at], full[0][at + len(bare) :]
    if any(TokenIds.joined([before, ids, behind]) != of_whole for ids, of_whole in zip(plain, full, strict=True)):
        return None
    return before, behind


def cuts_are_exact(tokenizer: Tokenizer, cuts: TextCuts) -> bool:
    """Check that canaries, cut at every possible place, get the same ids as uncut."""
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()][:64]
    texts = [*_CANARIES, "".join(_CANARIES), "".join(f"x y{text}\nZ {text}{text} q" for text in special)]
    return all(_cut_up(tokenizer, cuts.sized(size), texts) == encode_all(tokenizer, texts, False) for size in (1, 7))


def _cut_up(tokenizer: Tokenizer, cuts: TextCuts, texts: Sequence[str]) -> list[TokenIds]:
    return [TokenIds.joined(encode_all(tokenizer, cuts.chunks(text), False)) for text in texts]
