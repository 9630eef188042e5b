"""Who calls, and who may use the admin endpoints and pin a replica.

With an admin key set, an admin is who bears it. Without one, a caller on this machine: the peer of the connection is a loopback
address and nothing suggests that somebody else speaks through it, such as a proxy or a web page in a browser here. No header
can prove that there is no proxy, so behind one an admin key has to be set; headers only ever take the right away.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import SecretStr

from gateway.errors import Forbidden, NotAuthenticated
from gateway.settings import Settings
from gateway.tenants.loopback import is_loopback, is_loopback_host, names_loopback
from gateway.tenants.tenants import TenantContext, Tenants, bearer_token

# What proxies, load balancers and content networks add to tell for whom they speak.
_PROXY_PREFIXES = (
    *(b"x-forwarded", b"forwarded", b"x-original-", b"x-real-", b"x-proxy", b"proxy-", b"x-envoy-", b"x-amzn-", b"x-arr-"),
    *(b"cf-", b"cdn-", b"cloudfront-", b"fastly-", b"fly-", b"x-akamai-", b"x-appengine-", b"x-azure-", b"x-vercel-"),
)
_PROXY_SUFFIXES = (b"client-ip", b"user-ip", b"remote-ip", b"forwarded-for")
_PROXY_HEADERS = frozenset({b"via", b"max-forwards", b"x-host", b"x-scheme", b"x-remote-addr", b"remote-addr"})
# Of a browser's requests only those of our own page are let in, and what its user typed: a page has no say in this header.
_OWN_PAGE = frozenset({b"same-origin", b"none"})
_HOW = "Set PEERKV_ADMIN_KEY and send it as 'Authorization: Bearer <key>'."

Headers = Iterable[tuple[bytes, bytes]]


class AdminAccess:
    """The admin rule."""

    def __init__(self, admin_key: SecretStr | None) -> None:
        self.use(admin_key)

    def use(self, admin_key: SecretStr | None) -> None:
        """Ask for this key from now on."""
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
        # nginx speaks HTTP/1.0 to what it stands before, unless told otherwise; a client of today does not.
        if scope.get("http_version") == "1.0" or any(_is_a_proxys(name) for name, _ in headers):
            raise Forbidden(f"The request came through a proxy, so its caller is unknown. {_HOW}")
        if any(_is_of_another_page(*header) for header in headers) or not names_loopback(headers):
            raise Forbidden(f"Without an admin key the Host has to be localhost, and no other web page may use this. {_HOW}")

    def check_page(self, scope: Mapping[str, Any]) -> None:
        """Pass if the caller may load the page that asks for the admin key, or needs none. Raises Forbidden."""
        if self._key is None:
            # Browsers send an Origin with a page's own scripts too.
            self.check({**scope, "headers": [header for header in scope["headers"] if header[0] != b"origin"]})


def caller(tenants: Tenants, scope: Mapping[str, Any], authorization: bytes | None, host: bytes | None) -> TenantContext:
    """The tenant that a request of this ASGI scope, with these headers, is of. Raises NotAuthenticated, Forbidden.

    Where nobody needs a key it must come from this machine, unless the settings allow anyone; and not from a web page in a
    browser here, whose name was made to point here.
    """
    if tenants.open:
        client = scope.get("client")
        if client is not None and not is_loopback(client[0]):
            if not tenants.allow_anyone:
                raise Forbidden(
                    "Where no tenants or keys are configured, only callers on the gateway's own machine are answered. Make a "
                    "key with `peerkv keys add`, or let everybody in with --allow-anyone."
                )
        elif client is not None and not is_loopback_host(host or b""):
            raise Forbidden(
                "Where no tenants are configured, the Host of a request from the gateway's machine has to be localhost or a "
                "loopback address: else web pages in a browser here could use the model. Tenants may use other names."
            )
    return tenants.authenticate(authorization)


def open_to_others(settings: Settings) -> str:
    """A warning if other machines may use a gateway with these settings without a key, or reach it in vain; else nothing."""
    if settings.tenants or settings.keys_file or settings.host == "localhost" or is_loopback(settings.host):
        return ""
    if settings.allow_anyone:
        return (
            f"no tenants are configured: whoever reaches {settings.host} port {settings.port} can use the model, without a key"
        )
    return (
        f"it listens on {settings.host}, but no tenants or keys are configured: other machines' requests are refused. "
        "`peerkv keys add` makes a key, --allow-anyone lets everybody in"
    )


def _is_of_another_page(name: bytes, value: bytes) -> bool:
    """Whether a header says that a web page of others sends the request; a page's own GET has no Origin."""
    return name == b"origin" or (name == b"sec-fetch-site" and value not in _OWN_PAGE)


def _is_a_proxys(name: bytes) -> bool:
    return name in _PROXY_HEADERS or name.startswith(_PROXY_PREFIXES) or name.endswith(_PROXY_SUFFIXES)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
