"""Beginnings that texts share, found by their first characters and by comparison: a tenth of the time of hashing long ones.

A prefix is what texts with the same first characters have in common, up to a place where they may be cut (text_cuts.py): a
system prompt, then a document, then the beginning of a question. So a text's prefixes are a path in a tree, and what follows
them is new. A prefix is used only if the text begins with exactly its characters and may be cut after it.
"""

from collections.abc import Callable, Sequence

import msgspec

from gateway.prompts.tokenizer.text_cuts import TextCuts
from gateway.token_ids import TokenIds, new_serial

KEY_CHARS = 64
"""Prefixes are looked up by this many first characters, and only in longer texts."""
PREFIX_CHARS_MIN = 24
ENCODED_CHARS_MAX = 4096
"""A prefix that does not consist of chunks with known ids is no longer than this: its ids are worked out here and now."""
ENTRY_BYTES = 700
"""Size of a prefix without its text and ids: its key, the objects, and its place in a dictionary."""
TEXTS_MIN = 16
"""So many texts fit into a generation at least: of longer ones only the beginning is kept, and the rest after it is known."""
RUN_MAX = 16
"""A text that begins with more prefixes than this is a conversation that grew: those of its turns become one."""
_NO_PLACE = ""


class KnownPrefix(msgspec.Struct, frozen=True, gc=False, eq=False):
    """`forks`: texts went on differently after it, so it stays apart from what follows."""

    text: str
    ids: TokenIds
    forks: bool


class KnownPrefixes:
    """In two generations: when the younger one is full, the older one is dropped. Thread safe.

    `ids_of` gives the ids of a text. `bytes_max` bounds both generations together.
    """

    def __init__(self, ids_of: Callable[[str], bytes], cuts: TextCuts, bytes_max: int) -> None:
        self._ids_of = ids_of
        self._last_place, self._place_at = cuts.last_place, cuts.at
        self._generation_bytes_max = bytes_max // 2
        self._text_chars_max = self._generation_bytes_max // TEXTS_MIN
        self._bytes = 0
        self._prefixes: dict[str, KnownPrefix] = {}
        self._texts: dict[str, str] = {}  # without a known prefix
        self._older: tuple[dict[str, KnownPrefix], dict[str, str]] = ({}, {})

    def leading(self, text: str) -> tuple[int, list[TokenIds]]:
        """Return where the prefixes of `text` end, and their ids."""
        found: list[KnownPrefix] = []
        start, last = 0, len(text) - KEY_CHARS
        prefixes = self._prefixes
        while start < last:
            key = text[start : start + KEY_CHARS]
            prefix = prefixes.get(key) or self._from_older(key)
            if prefix is None or not text.startswith(prefix.text, start):
                break
            end = start + len(prefix.text)
            if not self._place_at(text, end):
                break
            found.append(prefix)
            start = end
        if len(found) > RUN_MAX:
            self._join(found)
        return start, [prefix.ids for prefix in found]

    def note(self, text: str, chunks: Sequence[str] = (), ids: Sequence[TokenIds] = ()) -> None:
        """Learn from a text, or from what follows its prefixes, of more than KEY_CHARS characters: what it has in common with
        the previous one.

        `chunks` are those of a long text, and `ids` theirs: a prefix consists of as many as are common to both, if any are.
        """
        key = text[:KEY_CHARS]
        prefix = self._prefixes.get(key)
        former = prefix.text if prefix is not None else self._texts.get(key, self._older[1].get(key))
        if former is None:
            self._keep_text(key, text[: self._text_chars_max])
        elif former:
            common = _common(text, former)
            known = self._in_common(text, common, chunks, ids)
            if known is not None:
                self._texts.pop(key, None)
                self._keep_prefix(*known, forks=common < len(former))
                if prefix is not None:
                    self._keep_rest(prefix, *known)
            elif prefix is None:
                self._keep_text(key, _NO_PLACE)

    def _in_common(self, text: str, common: int, chunks: Sequence[str], ids: Sequence[TokenIds]) -> tuple[str, bytes] | None:
        """Return the prefix that ends within the first `common` characters of a text, and its ids; None without a place."""
        if whole := _count_within(chunks[:-1], common):  # the last one ends with the text, where there may be no place
            return "".join(chunks[:whole]), b"".join([part.raw for part in ids[:whole]])
        place = self._last_place(text, PREFIX_CHARS_MIN, min(common, ENCODED_CHARS_MAX))
        return (text[:place], self._ids_of(text[:place])) if place else None

    def _keep_rest(self, former: KnownPrefix, text: str, ids: bytes) -> None:
        """Keep what a prefix had beyond `text`, its beginning, to which it was shortened: it comes after that."""
        rest = former.text[len(text) :]
        if len(rest) > KEY_CHARS and self._place_at(former.text, len(text)):
            self._keep_prefix(rest, former.ids.raw[len(ids) :], forks=former.forks)

    def _join(self, found: Sequence[KnownPrefix]) -> None:
        """Make one prefix of those after the last fork."""
        first = max((place for place, prefix in enumerate(found, 1) if prefix.forks), default=0)
        text = "".join([prefix.text for prefix in found[first:]])
        if len(found) - first > RUN_MAX // 2 and len(text) <= self._text_chars_max:
            self._keep_prefix(text, b"".join([prefix.ids.raw for prefix in found[first:]]), forks=False)

    def _from_older(self, key: str) -> KnownPrefix | None:
        prefix = self._older[0].get(key)
        if prefix is not None:
            self._keep(key, prefix)
        return prefix

    def _keep_prefix(self, text: str, ids: bytes, *, forks: bool) -> None:
        self._keep(text[:KEY_CHARS], KnownPrefix(text, TokenIds(ids, serial=new_serial()), forks))

    def _keep(self, key: str, prefix: KnownPrefix) -> None:
        self._prefixes[key] = prefix
        self._grown(ENTRY_BYTES + prefix.text.__sizeof__() + prefix.ids.held_bytes)

    def _keep_text(self, key: str, text: str) -> None:
        self._texts[key] = text
        self._grown(ENTRY_BYTES + text.__sizeof__())

    def _grown(self, held_bytes: int) -> None:
        self._bytes += held_bytes
        if self._bytes > self._generation_bytes_max:
            self._older = (self._prefixes, self._texts)
            self._prefixes, self._texts, self._bytes = {}, {}, 0


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


def _count_within(chunks: Sequence[str], chars_max: int) -> int:
    """Return how many leading chunks have no more than `chars_max` characters together."""
    chars = 0
    for count, chunk in enumerate(chunks):
        chars += len(chunk)
        if chars > chars_max:
            return count
    return len(chunks)
