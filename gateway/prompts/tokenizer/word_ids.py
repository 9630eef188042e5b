"""Ids of short texts, assembled from those of their words.

After a known beginning a prompt's text is new, but its words are not, and looking them up takes a tenth of the time of
tokenising them. text_cuts.py decides where a text may be cut between words: before a space between characters of certain kinds.
A word with anything else next to that space stays together with its neighbour.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from gateway.token_ids import TokenIds

ENTRY_BYTES = 220
"""Measured size of an entry without the characters of its text and its ids: two objects and their place in a dictionary."""
PARTS_MIN = 16
"""A text of fewer parts is not worth a separate entry."""

_EMPTY_BYTES = "".__sizeof__()
_New = list[tuple[int, str]]


class WordIds:
    """Ids under exact texts, in two generations: when the younger one is full, the older one is dropped. Thread safe.

    `tokenise` gives the ids of texts, one by one; `words` is what may stand before a space that a text is cut at, a class of
    a regular expression (text_cuts.py), "" if none is cut there. `bytes_max` bounds both generations together.
    """

    def __init__(self, tokenise: Callable[[list[str]], list[TokenIds]], words: str, bytes_max: int) -> None:
        self._tokenise = tokenise
        self._cuts_words = bool(words)
        self._is_word = re.compile(rf"[A-Za-z](?:[^ ]*[{words}])?" if words else r"(?!)").fullmatch
        self._ends_word = re.compile(f"[{words}]" if words else "(?!)").fullmatch
        self._generation_bytes_max = bytes_max // 2
        self._bytes = 0
        self._words: dict[str, bytes] = {}  # with places on both sides; the ids are those of the word with a space before it
        self._texts: dict[str, bytes] = {}
        self._older: tuple[dict[str, bytes], dict[str, bytes]] = ({}, {})

    def raw(self, texts: Sequence[str], new_chars_max: int | None = None) -> bytes | None:
        """Return the ids of `texts`, concatenated, as int32; None if more than `new_chars_max` characters are new.

        `texts` are whole, or parts between places where a text may be cut. Raises UnicodeEncodeError for half a surrogate pair.
        """
        parts: list[bytes] = []
        new: _New = []
        apart: list[tuple[str, int, int]] = []
        for text in texts:
            known = self._texts.get(text)
            if known is not None:
                parts.append(known)
                continue
            begin = len(parts)
            self._take_apart(text, parts, new)
            if len(parts) - begin >= PARTS_MIN:
                apart.append((text, begin, len(parts)))
        if new:
            if new_chars_max is not None and sum(len(text) for _, text in new) > new_chars_max:
                return None
            self._learn(parts, new)
        for text, begin, end in apart:
            self._keep(text, b"".join(parts[begin:end]))
        return b"".join(parts)

    def _take_apart(self, text: str, parts: list[bytes], new: _New) -> None:
        """Append the ids of the parts of `text` to `parts`, and unknown parts to `new` with their place there."""
        words = text.split(" ") if self._cuts_words else [text]
        found: list[Any] = list(map(self._words.get, words))
        done, count = 0, len(words)
        if not words[0] and count > 1:
            done = 1  # the text begins with a space
        else:
            found[0] = None  # no space stands before it
        found.append(None)  # so that one is always found
        while (unknown := found.index(None, done)) < count:
            begin, end = unknown, unknown + 1
            while begin > done and not self._place(words[begin - 1], words[begin]):
                begin -= 1
            while end < count and not self._place(words[end - 1], words[end]):
                end += 1
            parts += found[done:begin]
            group = " ".join(words[begin:end])
            if begin:
                group = " " + group
            ids = self._find(group)
            if ids is None:
                new.append((len(parts), group))
            parts.append(ids or b"")
            done = end
        parts += found[done:count]

    def _place(self, before: str, behind: str) -> bool:
        """Tell whether a text may be cut before the space between these two words."""
        first = behind[:1]
        return first.isascii() and first.isalpha() and self._ends_word(before[-1:]) is not None

    def _learn(self, parts: list[bytes], new: _New) -> None:
        texts = list(dict.fromkeys(text for _, text in new))
        for text in texts:
            text.encode()  # raises for half a surrogate pair, which the tokenizer would take for a wrong type
        ids = dict(zip(texts, (found.raw for found in self._tokenise(texts)), strict=True))
        for text, raw in ids.items():
            self._keep(text, raw)
        for place, text in new:
            parts[place] = ids[text]

    def _find(self, text: str) -> bytes | None:
        """Return the ids of a text, and move it to the younger generation."""
        known = self._texts.get(text)
        if known is None and text[:1] == " ":  # what a piece begins with
            known = self._words.get(text[1:])
        if known is not None:
            return known
        words, texts = self._older
        known = texts.get(text) or words.get(text[1:]) if text[:1] == " " else texts.get(text)
        if known is not None:
            self._keep(text, known)
        return known

    def _keep(self, text: str, ids: bytes) -> None:
        if text[:1] == " " and self._is_word(text, 1):
            self._words[text[1:]] = ids
        else:
            self._texts[text] = ids
        self._bytes += ENTRY_BYTES + text.__sizeof__() - _EMPTY_BYTES + len(ids)
        if self._bytes > self._generation_bytes_max:
            self._older = (self._words, self._texts)
            self._words, self._texts, self._bytes = {}, {}, 0
