"""Long stretches of text that were seen before, found by comparing them: a tenth of the time that it takes to hash them.

A page is a run of chunks (text_cuts.py) from a place where a text may be cut to another one. It is looked for by samples of the
text behind that place, and taken only if the text there is exactly its own, with as much behind it as decides that the text may
be cut there: what follows it is cut as it would be without pages.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from threading import Lock

import msgspec

from gateway.token_ids import TokenIds

PAGE_CHARS_MIN = 16384
"""A page ends with the first chunk that makes it so long."""
ENTRY_BYTES = 900
"""What a page takes beside its text and its ids: its samples, the objects, and its place in an ordered dictionary."""
REPLACED_EVERY = 8
"""One page in so many takes the place of another one that looks the same, so that those that come by turns cost little."""
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

    Of pages that look the same in all samples one is kept. `specials` are those that texts are cut before.
    """

    def __init__(self, bytes_max: int, specials: Sequence[str] = ()) -> None:
        self._bytes_max = bytes_max
        self._special_chars = {special[0]: max(map(len, specials)) for special in specials}
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._bytes = 0
        self._alike = 0
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

    def keep(self, chunks: Sequence[str], ids: Sequence[TokenIds], behind: str) -> None:
        """Keep `chunks`, more than PAGE_CHARS_MIN characters, as a page with their ids; `behind` is the chunk behind them."""
        text = "".join(chunks)
        samples = _samples(text, 0)
        with self._lock:
            former = self._pages.get(samples)
            if former is not None:
                self._alike += 1
                if self._alike % REPLACED_EVERY:
                    return
                self._bytes -= self._pages.pop(samples).held_bytes
            behind = behind[: self._special_chars.get(behind[0], 2)]  # two: a space and a letter
            raw = b"".join([part.raw for part in ids])
            page = Page(text + behind, len(text), TokenIds(raw, serial=next(_serials).to_bytes(8, "little")))
            self._bytes += page.held_bytes
            self._pages[samples] = page
            while self._bytes > self._bytes_max:
                _, oldest = self._pages.popitem(last=False)
                self._bytes -= oldest.held_bytes


def _samples(text: str, start: int) -> str:
    return "".join([text[start + at : start + at + _SAMPLE_CHARS] for at in _SAMPLES])
