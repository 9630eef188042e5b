"""The prompts of attempts that are not settled yet: their losses are judged by what was computed of them before."""

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

PROMPTS_BYTES_MAX = 256 << 20


class Origin(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Whose prompt an attempt computes: what its token ids are worth, and to whom."""

    tenant: str
    ids: Sequence[int] | None
    lora: str

    @property
    def held_bytes(self) -> int:
        """Four bytes a token id, all counted, though most are shared with the cache of token ids."""
        return 4 * len(self.ids) if self.ids is not None else 0


class Origins:
    """Origins by tag. Over `bytes_max` the oldest are dropped: their attempts are judged without their history."""

    def __init__(self, bytes_max: int = PROMPTS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._origins: OrderedDict[int, Origin] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._origins)

    def keep(self, tag: int, origin: Origin) -> None:
        """Keep the origin of an attempt that begins."""
        self._origins[tag] = origin
        self._bytes += origin.held_bytes
        while self._bytes > self._bytes_max:
            _, oldest = self._origins.popitem(last=False)
            self._bytes -= oldest.held_bytes

    def pop(self, tag: int) -> Origin | None:
        """Return an attempt's origin and keep it no longer; None if it was dropped."""
        origin = self._origins.pop(tag, None)
        if origin is not None:
            self._bytes -= origin.held_bytes
        return origin
