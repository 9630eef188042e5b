"""Cross-origin requests: what browsers ask and are told about the pages that may call the gateway.

Stands in front of everything else, so that a preflight needs no key and an error can be read by the page as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence

from gateway.api.endpoints import ADMIN_PATHS
from gateway.http_server.request_cycle import Asgi, Receive, Scope, Send, cycle_of

ANY = "*"
PREFLIGHT_SECONDS = 600
"""A browser asks again after so long; none remembers an answer for less than 5 s, or Chrome's for more than 2 hours."""
_METHODS = b"GET, HEAD, POST, OPTIONS"
_SHOWN = b"x-request-id, x-peerkv-replica, x-peerkv-cache, x-peerkv-quality, retry-after, " + b", ".join(
    b"x-ratelimit-%b-%b" % (what, of) for what in (b"limit", b"remaining", b"reset") for of in (b"requests", b"tokens")
)
_VARY = b"vary: origin\r\n"


class Cors:
    """An ASGI application that lets pages of `origins` use `app`, all but what the admin rule guards; "*" are all pages."""

    def __init__(self, app: Asgi, origins: Sequence[str]) -> None:
        self._app = app
        self._any = ANY in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """ASGI entry."""
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if scope["path"].startswith(ADMIN_PATHS):
            return self._app(scope, receive, send)
        cycle = cycle_of(scope)
        cycle.extra_lines = b"" if self._any else _VARY
        if origin is not None and (self._any or origin in self._origins):
            cycle.extra_lines += b"access-control-allow-origin: %b\r\n" % (ANY.encode() if self._any else origin)
            asked = dict(scope["headers"])
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in asked:
                return _preflight(scope, asked.get(b"access-control-request-headers", b""))
            cycle.extra_lines += b"access-control-expose-headers: %b\r\n" % _SHOWN
        return self._app(scope, receive, send)


async def _preflight(scope: Scope, headers: bytes) -> None:
    """All headers that a page wants to send are allowed: unknown ones are ignored."""
    lines = b"access-control-allow-methods: %b\r\naccess-control-max-age: %d\r\n" % (_METHODS, PREFLIGHT_SECONDS)
    if headers:
        lines += b"access-control-allow-headers: %b\r\n" % headers
    cycle = cycle_of(scope)
    cycle.begin(204, lines, 0)
    cycle.end()
