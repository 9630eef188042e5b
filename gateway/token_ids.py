"""A prompt's token ids, in the forms that are wanted of them: bytes to hash, JSON to send, numbers to compare."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import count
from typing import overload

import msgspec
import numpy as np

from transport.int32 import int32_bytes

_encode = msgspec.json.Encoder().encode
_BIG_ENDIAN = sys.byteorder == "big"
_serials = count(1)


def new_serial() -> bytes:
    """Return a name that no other ids of this process have, whichever cache keeps them. Thread safe."""
    return next(_serials).to_bytes(8, "little")


class TokenIds(Sequence[int]):
    """Token ids as little-endian int32, four bytes each, in `raw`. Not changed once made; equal to a list of the same ids.

    Those that were joined from parts hold nothing but these, which others share: their forms are assembled each time.
    """

    __slots__ = ("_count", "_parts", "_raw", "_text", "serial")

    def __init__(self, raw: bytes, serial: bytes = b"", text: bytes | None = None) -> None:
        self.serial = serial
        """Names these very ids, where they are long and used often: what is worked out of them can be kept under it."""
        self._raw = raw
        self._parts: Sequence[TokenIds] = ()
        self._text = text
        self._count = len(raw) >> 2

    @classmethod
    def of(cls, ids: Iterable[int]) -> TokenIds:
        """Return `ids` in this form. Raises TypeError for anything but integers, OverflowError for integers outside int32."""
        return cls(int32_bytes(ids if isinstance(ids, Sequence) else list(ids)))

    @classmethod
    def joined(cls, parts: Sequence[TokenIds]) -> TokenIds:
        """Return the ids of all parts in order."""
        if len(parts) == 1:
            return parts[0]
        flat: list[TokenIds] = []
        whole, count = cls(b""), 0
        for part in parts:
            if part._count:
                count += part._count
                if part._parts:
                    flat += part._parts
                else:
                    flat.append(part)
        whole._parts, whole._count = flat, count
        return whole

    @property
    def raw(self) -> bytes:
        """The ids as int32, little-endian."""
        return b"".join([part._raw for part in self._parts]) if self._parts else self._raw

    @property
    def parts(self) -> Sequence[TokenIds]:
        """What they were joined from, none of it joined itself; themselves if they were not."""
        return self._parts or (self,)

    @property
    def held_bytes(self) -> int:
        """The memory that its forms take at most: four bytes an id, and up to seven when it is written out."""
        return self._count * 11

    @property
    def text(self) -> bytes:
        """The ids in decimals, with commas between them. Worked out once for each part."""
        if self._parts:
            return b"".join(self.texts())
        if self._text is None:
            self._text = _encode(self.tolist())[1:-1]
        return self._text

    def texts(self) -> list[bytes]:
        """What `text` is joined from, to be sent one behind the other."""
        if not self._parts:
            return [self.text]
        found = [each for part in self._parts for each in (part._text or part.text, b",")]
        found.pop()
        return found

    def json(self) -> msgspec.Raw:
        """The ids as a JSON list, for msgspec to put where it belongs."""
        return msgspec.Raw(b"[%b]" % self.text)

    def numpy(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """The ids as an array that cannot be written to."""
        return np.frombuffer(self.raw, "<i4")

    def tolist(self) -> list[int]:
        """The ids as a list."""
        if _BIG_ENDIAN:
            return self.numpy().tolist()
        return memoryview(self.raw).cast("i").tolist()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> TokenIds: ...
    def __getitem__(self, place: int | slice) -> int | TokenIds:
        if isinstance(place, slice):
            return TokenIds(self.numpy()[place].tobytes())
        return int(self.numpy()[place])

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, TokenIds):
            return self.raw == other.raw
        return self.tolist() == other if isinstance(other, list) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"TokenIds of {len(self)} tokens"
