"""Long stretches of text that were seen before, found by comparison: a tenth of the time of hashing them.

A prefix here is a run of chunks (text_cuts.py) from the beginning of a text, or from the end of the prefix before, up to where
the text may be cut. It is looked up by samples of the text, and used only if the text there is exactly its own, with enough
after it to decide that the text may be cut there: what follows is cut as it would be without prefixes.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import msgspec

from gateway.token_ids import TokenIds, new_serial

LONG_PREFIX_CHARS_MIN = 16384
"""A long prefix ends with the first chunk that makes it this long."""
MEDIUM_PREFIX_CHARS_MIN = 2048
"""What remains after the long prefixes is kept as a medium one if it is this long."""
ENTRY_BYTES = 900
"""Size of a prefix without its text and ids: its samples, the objects, and its place in an ordered dictionary."""
REPLACED_EVERY = 8
"""One prefix in this many replaces another one that looks the same, so that alternating ones cost little."""
_SAMPLES = 5
_SAMPLE_CHARS = 24


def _nowhere(text: str, at: int) -> bool:
    return False


class LongPrefix(msgspec.Struct, frozen=True, gc=False, eq=False):
    """`text` is the prefix's own text of `chars` characters plus what followed it, enough to decide about the place."""

    text: str
    chars: int
    ids: TokenIds

    @property
    def held_bytes(self) -> int:
        return self.text.__sizeof__() + self.ids.held_bytes + ENTRY_BYTES


class LongPrefixes:
    """At most `bytes_max` bytes of prefixes; the least recently used are dropped first. Thread safe.

    Of prefixes that look the same in all samples, taken from the first `chars_min` characters, one is kept: their common
    beginning if that is long enough, otherwise one of the two. `specials` are the special tokens that texts are cut before,
    and `place_at` tells whether a text may be cut at a place.
    """

    def __init__(
        self,
        bytes_max: int,
        specials: Sequence[str] = (),
        chars_min: int = LONG_PREFIX_CHARS_MIN,
        place_at: Callable[[str, int], bool] | None = None,
    ) -> None:
        self._place_at = place_at or _nowhere
        self._bytes_max = bytes_max
        self._chars_min = chars_min
        self._sampled = tuple(slice(at, at + _SAMPLE_CHARS) for at in range(0, chars_min, -(-chars_min // _SAMPLES)))
        self._special_chars = {special[0]: max(map(len, specials)) for special in specials}
        self._long_prefixes: OrderedDict[str, LongPrefix] = OrderedDict()
        self._bytes = 0
        self._alike = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._long_prefixes)

    def leading(self, text: str, start: int = 0) -> tuple[int, list[LongPrefix]]:
        """Return where the prefixes of `text` from `start` on end, and these."""
        found: list[LongPrefix] = []
        with self._lock:
            while len(text) - start > self._chars_min:
                samples = self._samples(text[start : start + self._chars_min] if start else text)
                prefix = self._long_prefixes.get(samples)
                if prefix is None or not (text.startswith(prefix.text, start) or self._goes_on_otherwise(prefix, text, start)):
                    break
                self._long_prefixes.move_to_end(samples)
                found.append(prefix)
                start += prefix.chars
        return start, found

    def _goes_on_otherwise(self, prefix: LongPrefix, text: str, start: int) -> bool:
        return self._place_at(text, start + prefix.chars) and text.startswith(prefix.text[: prefix.chars], start)

    def keep(self, chunks: Sequence[str], ids: Sequence[TokenIds], behind: str) -> None:
        """Keep `chunks`, of `chars_min` characters or more, as a prefix with their ids; `behind` is the chunk after them."""
        samples = self._samples(chunks[0] if len(chunks[0]) >= self._chars_min else "".join(chunks))
        with self._lock:
            former = self._long_prefixes.get(samples)
            if former is not None:
                common, chars = _common(chunks, former.text)
                if self._chars_min <= chars < former.chars and common < len(chunks):
                    behind = chunks[common]
                    chunks, ids = chunks[:common], ids[:common]
                else:
                    self._alike += 1
                    if self._alike % REPLACED_EVERY:
                        return
                self._bytes -= self._long_prefixes.pop(samples).held_bytes
            text = "".join(chunks)
            behind = behind[: self._special_chars.get(behind[0], 2)]  # two: a space and a letter
            raw = b"".join([part.raw for part in ids])
            prefix = LongPrefix(text + behind, len(text), TokenIds(raw, serial=new_serial()))
            self._bytes += prefix.held_bytes
            self._long_prefixes[samples] = prefix
            while self._bytes > self._bytes_max:
                _, oldest = self._long_prefixes.popitem(last=False)
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
