"""Beginnings that short texts share, found by their first characters and by comparison.

A head is what texts with the same first characters have in common, up to a place where they may be cut (text_cuts.py): a system
prompt, then a document, then the beginning of a question. What follows a text's heads is new. A head is used only if the text
is exactly the head's and may be cut after it.
"""

from collections.abc import Callable

import msgspec

from gateway.prompts.tokenizer.text_cuts import TextCuts
from gateway.token_ids import TokenIds, new_serial

KEY_CHARS = 64
"""Heads are looked up by this many first characters, and only in longer texts."""
HEAD_CHARS_MIN = 24
SERIAL_CHARS_MIN = 512
"""Keys of longer heads' ids are kept (chain_cache.py); hashing those of shorter ones is faster than looking them up."""
ENTRY_BYTES = 700
"""Size of a head without its text and ids: its key, the objects, and its place in a dictionary."""
_NO_PLACE = ""


class Head(msgspec.Struct, frozen=True, gc=False, eq=False):
    text: str
    ids: TokenIds


class Heads:
    """In two generations: when the younger one is full, the older one is dropped. Thread safe.

    `ids_of` gives the ids of a text. `bytes_max` bounds both generations together.
    """

    def __init__(self, ids_of: Callable[[str], bytes], cuts: TextCuts, bytes_max: int) -> None:
        self._ids_of = ids_of
        self._last_place, self._place_at = cuts.last_place, cuts.at
        self._generation_bytes_max = bytes_max // 2
        self._bytes = 0
        self._heads: dict[str, Head] = {}
        self._texts: dict[str, str] = {}  # without a known head
        self._older: tuple[dict[str, Head], dict[str, str]] = ({}, {})

    def leading(self, text: str) -> tuple[int, list[TokenIds]]:
        """Return where the heads of `text` end, and their ids."""
        found: list[TokenIds] = []
        start, last = 0, len(text) - KEY_CHARS
        heads = self._heads
        while start < last:
            key = text[start : start + KEY_CHARS]
            head = heads.get(key) or self._from_older(key)
            if head is None or not text.startswith(head.text, start):
                break
            end = start + len(head.text)
            if not self._place_at(text, end):
                break
            found.append(head.ids)
            start = end
        return start, found

    def note(self, text: str) -> None:
        """Learn from a text, or from what follows its heads: what it has in common with the previous one."""
        if len(text) <= KEY_CHARS:
            return
        key = text[:KEY_CHARS]
        head = self._heads.get(key)
        former = head.text if head is not None else self._texts.get(key, self._older[1].get(key))
        if former is None:
            self._keep_text(key, text)
        elif former:
            place = self._last_place(text, HEAD_CHARS_MIN, _common(text, former))
            if place:
                self._keep_head(key, text[:place])
            elif head is None:
                self._keep_text(key, _NO_PLACE)

    def _from_older(self, key: str) -> Head | None:
        head = self._older[0].get(key)
        if head is not None:
            self._keep(key, head)
        return head

    def _keep_head(self, key: str, text: str) -> None:
        serial = new_serial() if len(text) >= SERIAL_CHARS_MIN else b""
        self._texts.pop(key, None)
        self._keep(key, Head(text, TokenIds(self._ids_of(text), serial=serial)))

    def _keep(self, key: str, head: Head) -> None:
        self._heads[key] = head
        self._grown(ENTRY_BYTES + head.text.__sizeof__() + head.ids.held_bytes)

    def _keep_text(self, key: str, text: str) -> None:
        self._texts[key] = text
        self._grown(ENTRY_BYTES + text.__sizeof__())

    def _grown(self, held_bytes: int) -> None:
        self._bytes += held_bytes
        if self._bytes > self._generation_bytes_max:
            self._older = (self._heads, self._texts)
            self._heads, self._texts, self._bytes = {}, {}, 0


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
