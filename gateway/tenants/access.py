"""Who may use the admin endpoints and pin a replica.

With an admin key set, its bearer. Without one, a caller on this machine: the peer of the connection is a loopback
address and nothing suggests that somebody else speaks through it, such as a proxy or a web page in a browser here.
Headers like X-Forwarded-For can only take the right away.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import SecretStr

from gateway.errors import Forbidden, NotAuthenticated
from gateway.tenants.tenants import bearer_token

_PROXY_HEADERS = frozenset({b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"forwarded", b"via"})
_BROWSER_HEADERS = frozenset({b"origin", b"sec-fetch-site"})
_HOW = "Set PEERKV_ADMIN_KEY and send it as 'Authorization: Bearer <key>'."

Headers = Iterable[tuple[bytes, bytes]]


class AdminAccess:
    """The admin rule."""

    def __init__(self, admin_key: SecretStr | None) -> None:
        self._key = None if admin_key is None else _digest(admin_key.get_secret_value().encode())

    def check(self, scope: Mapping[str, Any]) -> None:
        """Pass if the request of this ASGI scope is an admin's. Raises NotAuthenticated, Forbidden."""
        headers: Headers = scope["headers"]
        if self._key is not None:
            authorization = next((value for name, value in headers if name == b"authorization"), None)
            token = bearer_token(authorization)
            if token is None or not hmac.compare_digest(_digest(token), self._key):
                raise NotAuthenticated("This needs the admin key: 'Authorization: Bearer <admin key>'.")
            return
        client = scope.get("client")
        if client is None or not is_loopback(client[0]):
            raise Forbidden(f"Without an admin key this is for callers on the gateway's machine only. {_HOW}")
        names = {name for name, _ in headers}
        if names & _PROXY_HEADERS:
            raise Forbidden(f"The request came through a proxy, so its caller is unknown. {_HOW}")
        host = next((value for name, value in headers if name == b"host"), b"")
        if names & _BROWSER_HEADERS or not _names_this_machine(host):
            raise Forbidden(f"Web pages may not use this without an admin key. {_HOW}")


def is_loopback(address: str) -> bool:
    """Whether an IP address is a loopback one, also as IPv4 inside IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


def _names_this_machine(host: bytes) -> bool:
    """A Host header that a web page cannot make its own name resolve to: an IP address or localhost."""
    name = host.decode("latin-1").strip().lower()
    name = name[1 : name.index("]")] if name.startswith("[") and "]" in name else name.rsplit(":", 1)[0]
    if name in ("", "localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
