"""Long stretches of text that were seen before, found by comparing them: a tenth of the time that it takes to hash them.

A page is a run of chunks (text_cuts.py) from a place where a text may be cut to another one. It is looked for by samples of the
text behind that place, and taken only if the text there is exactly its own, with as much behind it as decides that the text may
be cut there: what follows it is cut as it would be without pages.
"""

from collections import OrderedDict
from itertools import count
from threading import Lock

import msgspec

from gateway.token_ids import TokenIds

PAGE_CHARS_MIN = 16384
"""A page ends with the first chunk that makes it so long."""
ENTRY_BYTES = 900
"""What a page takes beside its text and its ids: its samples, the objects, and its place in an ordered dictionary."""
_SAMPLES = tuple(PAGE_CHARS_MIN * part // 5 for part in range(5))
_SAMPLE_CHARS = 24
_serials = count(1)


class Page(msgspec.Struct, frozen=True, gc=False, eq=False):
    """`text` is the page's own, of `chars` characters, and what has to stand behind it."""

    text: str
    chars: int
    ids: TokenIds

    @property
    def held_bytes(self) -> int:
        return self.text.__sizeof__() + self.ids.held_bytes + ENTRY_BYTES


class Pages:
    """At most `bytes_max` bytes of them, least recently used out first. Thread safe.

    Of pages that look the same in all samples the last one is kept. `behind_chars` is how much text behind a place decides that
    it is one.
    """

    def __init__(self, bytes_max: int, behind_chars: int) -> None:
        self._bytes_max = bytes_max
        self._behind_chars = behind_chars
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._pages)

    def leading(self, text: str) -> tuple[int, list[TokenIds]]:
        """Return how many characters of `text` are pages, and the ids of these, page by page."""
        start, found = 0, list[TokenIds]()
        with self._lock:
            while len(text) - start > PAGE_CHARS_MIN:
                samples = _samples(text, start)
                page = self._pages.get(samples)
                if page is None or not text.startswith(page.text, start):
                    break
                self._pages.move_to_end(samples)
                found.append(page.ids)
                start += page.chars
        return start, found

    def keep(self, text: str, start: int, end: int, ids: TokenIds) -> None:
        """Keep `text` from `start` to `end`, both places where it is cut, more than PAGE_CHARS_MIN apart, with its ids."""
        named = TokenIds(ids.raw, serial=next(_serials).to_bytes(8, "little"))
        page = Page(text[start : end + self._behind_chars], end - start, named)
        samples = _samples(text, start)
        with self._lock:
            former = self._pages.pop(samples, None)
            self._bytes += page.held_bytes - (former.held_bytes if former is not None else 0)
            self._pages[samples] = page
            while self._bytes > self._bytes_max:
                _, oldest = self._pages.popitem(last=False)
                self._bytes -= oldest.held_bytes


def _samples(text: str, start: int) -> str:
    return "".join([text[start + at : start + at + _SAMPLE_CHARS] for at in _SAMPLES])
