"""Long stretches of text that were seen before, found by comparison: a tenth of the time of hashing them.

A page is a run of chunks (text_cuts.py) between two places where a text may be cut. It is looked up by samples of the text
after the first place, and used only if the text there is exactly its own, with enough after it to decide that the text may be
cut there: what follows is cut as it would be without pages.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import msgspec

from gateway.token_ids import TokenIds, new_serial

PAGE_CHARS_MIN = 16384
"""A page ends with the first chunk that makes it this long."""
LEAF_CHARS_MIN = 2048
"""What remains after the pages is kept as a shorter page, a leaf, if it is this long."""
ENTRY_BYTES = 900
"""Size of a page without its text and ids: its samples, the objects, and its place in an ordered dictionary."""
REPLACED_EVERY = 8
"""One page in this many replaces another one that looks the same, so that alternating ones cost little."""
_SAMPLES = 5
_SAMPLE_CHARS = 24


def _nowhere(text: str, at: int) -> bool:
    return False


class Page(msgspec.Struct, frozen=True, gc=False, eq=False):
    """`text` is the page's own text of `chars` characters plus what followed it, enough to decide about the place."""

    text: str
    chars: int
    ids: TokenIds

    @property
    def held_bytes(self) -> int:
        return self.text.__sizeof__() + self.ids.held_bytes + ENTRY_BYTES


class Pages:
    """At most `bytes_max` bytes of pages; the least recently used are dropped first. Thread safe.

    Of pages that look the same in all samples, taken from the first `chars_min` characters, one is kept: their common
    beginning if that is long enough, otherwise one of the two. `specials` are the special tokens that texts are cut before,
    and `place_at` tells whether a text may be cut at a place.
    """

    def __init__(
        self,
        bytes_max: int,
        specials: Sequence[str] = (),
        chars_min: int = PAGE_CHARS_MIN,
        place_at: Callable[[str, int], bool] | None = None,
    ) -> None:
        self._place_at = place_at or _nowhere
        self._bytes_max = bytes_max
        self._chars_min = chars_min
        self._sampled = tuple(slice(at, at + _SAMPLE_CHARS) for at in range(0, chars_min, -(-chars_min // _SAMPLES)))
        self._special_chars = {special[0]: max(map(len, specials)) for special in specials}
        self._pages: OrderedDict[str, Page] = OrderedDict()
        self._bytes = 0
        self._alike = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._pages)

    def leading(self, text: str, start: int = 0) -> tuple[int, list[Page]]:
        """Return where the pages of `text` from `start` on end, and these."""
        found: list[Page] = []
        with self._lock:
            while len(text) - start > self._chars_min:
                samples = self._samples(text[start : start + self._chars_min] if start else text)
                page = self._pages.get(samples)
                if page is None or not (text.startswith(page.text, start) or self._goes_on_otherwise(page, text, start)):
                    break
                self._pages.move_to_end(samples)
                found.append(page)
                start += page.chars
        return start, found

    def _goes_on_otherwise(self, page: Page, text: str, start: int) -> bool:
        return self._place_at(text, start + page.chars) and text.startswith(page.text[: page.chars], start)

    def keep(self, chunks: Sequence[str], ids: Sequence[TokenIds], behind: str) -> None:
        """Keep `chunks`, of `chars_min` characters or more, as a page with their ids; `behind` is the chunk after them."""
        samples = self._samples(chunks[0] if len(chunks[0]) >= self._chars_min else "".join(chunks))
        with self._lock:
            former = self._pages.get(samples)
            if former is not None:
                common, chars = _common(chunks, former.text)
                if self._chars_min <= chars < former.chars and common < len(chunks):
                    behind = chunks[common]
                    chunks, ids = chunks[:common], ids[:common]
                else:
                    self._alike += 1
                    if self._alike % REPLACED_EVERY:
                        return
                self._bytes -= self._pages.pop(samples).held_bytes
            text = "".join(chunks)
            behind = behind[: self._special_chars.get(behind[0], 2)]  # two: a space and a letter
            raw = b"".join([part.raw for part in ids])
            page = Page(text + behind, len(text), TokenIds(raw, serial=new_serial()))
            self._bytes += page.held_bytes
            self._pages[samples] = page
            while self._bytes > self._bytes_max:
                _, oldest = self._pages.popitem(last=False)
                self._bytes -= oldest.held_bytes

    def _samples(self, text: str) -> str:
        return "".join([text[place] for place in self._sampled])


def _common(chunks: Sequence[str], text: str) -> tuple[int, int]:
    """Return how many leading chunks `text` begins with, and how many characters these have."""
    chars = 0
    for place, chunk in enumerate(chunks):
        if not text.startswith(chunk, chars):
            return place, chars
        chars += len(chunk)
    return len(chunks), chars
