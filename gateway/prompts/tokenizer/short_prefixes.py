"""Beginnings that short texts share, found by their first characters and by comparison.

A short prefix is what texts with the same first characters have in common, up to a place where they may be cut (text_cuts.py):
a system prompt, then a document, then the beginning of a question. What follows a text's prefixes is new. A prefix is used only
if the text begins with exactly its characters and may be cut after it.
"""

from collections.abc import Callable

import msgspec

from gateway.prompts.tokenizer.text_cuts import TextCuts
from gateway.token_ids import TokenIds, new_serial

KEY_CHARS = 64
"""ShortPrefixes are looked up by this many first characters, and only in longer texts."""
SHORT_PREFIX_CHARS_MIN = 24
SERIAL_CHARS_MIN = 512
"""Keys of longer prefixes' ids are kept (chain_cache.py); hashing those of shorter ones is faster than looking them up."""
ENTRY_BYTES = 700
"""Size of a prefix without its text and ids: its key, the objects, and its place in a dictionary."""
_NO_PLACE = ""


class ShortPrefix(msgspec.Struct, frozen=True, gc=False, eq=False):
    text: str
    ids: TokenIds


class ShortPrefixes:
    """In two generations: when the younger one is full, the older one is dropped. Thread safe.

    `ids_of` gives the ids of a text. `bytes_max` bounds both generations together.
    """

    def __init__(self, ids_of: Callable[[str], bytes], cuts: TextCuts, bytes_max: int) -> None:
        self._ids_of = ids_of
        self._last_place, self._place_at = cuts.last_place, cuts.at
        self._generation_bytes_max = bytes_max // 2
        self._bytes = 0
        self._short_prefixes: dict[str, ShortPrefix] = {}
        self._texts: dict[str, str] = {}  # without a known prefix
        self._older: tuple[dict[str, ShortPrefix], dict[str, str]] = ({}, {})

    def leading(self, text: str) -> tuple[int, list[TokenIds]]:
        """Return where the prefixes of `text` end, and their ids."""
        found: list[TokenIds] = []
        start, last = 0, len(text) - KEY_CHARS
        prefixes = self._short_prefixes
        while start < last:
            key = text[start : start + KEY_CHARS]
            prefix = prefixes.get(key) or self._from_older(key)
            if prefix is None or not text.startswith(prefix.text, start):
                break
            end = start + len(prefix.text)
            if not self._place_at(text, end):
                break
            found.append(prefix.ids)
            start = end
        return start, found

    def note(self, text: str) -> None:
        """Learn from a text, or from what follows its prefixes: what it has in common with the previous one."""
        if len(text) <= KEY_CHARS:
            return
        key = text[:KEY_CHARS]
        prefix = self._short_prefixes.get(key)
        former = prefix.text if prefix is not None else self._texts.get(key, self._older[1].get(key))
        if former is None:
            self._keep_text(key, text)
        elif former:
            place = self._last_place(text, SHORT_PREFIX_CHARS_MIN, _common(text, former))
            if place:
                self._keep_prefix(key, text[:place])
            elif prefix is None:
                self._keep_text(key, _NO_PLACE)

    def _from_older(self, key: str) -> ShortPrefix | None:
        prefix = self._older[0].get(key)
        if prefix is not None:
            self._keep(key, prefix)
        return prefix

    def _keep_prefix(self, key: str, text: str) -> None:
        serial = new_serial() if len(text) >= SERIAL_CHARS_MIN else b""
        self._texts.pop(key, None)
        self._keep(key, ShortPrefix(text, TokenIds(self._ids_of(text), serial=serial)))

    def _keep(self, key: str, prefix: ShortPrefix) -> None:
        self._short_prefixes[key] = prefix
        self._grown(ENTRY_BYTES + prefix.text.__sizeof__() + prefix.ids.held_bytes)

    def _keep_text(self, key: str, text: str) -> None:
        self._texts[key] = text
        self._grown(ENTRY_BYTES + text.__sizeof__())

    def _grown(self, held_bytes: int) -> None:
        self._bytes += held_bytes
        if self._bytes > self._generation_bytes_max:
            self._older = (self._short_prefixes, self._texts)
            self._short_prefixes, self._texts, self._bytes = {}, {}, 0


def _common(text: str, other: str) -> int:
    """Return how many leading characters both share."""
    least, most = 0, min(len(text), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if text.startswith(other[least:middle], least):
            least = middle
        else:
            most = middle - 1
    return least
