"""A request's head that was parsed before: on a connection clients send the same one again, but for the body's length."""

from __future__ import annotations

from gateway.cycle import RawHeaders, Scope
from gateway.head_bytes import Cut, HeadBytes, cut_head
from gateway.head_fields import HeadFields


class KnownHead(HeadBytes):
    """What was parsed of a head: all of its scope but for the length in `headers`, which is at `place`, and its `fields`."""

    __slots__ = ("_headers", "_place", "_scope", "fields")

    def __init__(self, cut: Cut, scope: Scope) -> None:
        super().__init__(cut)
        self._place, self._scope = cut.place, dict(scope)
        self._headers: RawHeaders = list(scope["headers"])
        self.fields = HeadFields.of(self._headers)

    @classmethod
    def of(cls, data: bytes, scope: Scope) -> KnownHead | None:
        """Remember the head that `data` begins with, parsed into `scope`; None for what may mean something else next time.

        The caller vouches that it is of HTTP/1.1, is kept alive, asks for no upgrade and expects no "100 Continue".
        """
        cut = cut_head(data, scope["headers"])
        return None if cut is None else cls(cut, scope)

    def scope(self, data: bytes, start: int) -> tuple[Scope, int]:
        """The scope of the request that `data` begins with and its body's length; `start` is what `body_starts` said."""
        digits = self.digits(data, start)
        headers = self._headers.copy()
        headers[self._place] = (b"content-length", digits)
        scope = self._scope.copy()
        scope["headers"] = headers
        return scope, int(digits)
