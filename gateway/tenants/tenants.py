"""Who calls: an API key becomes a tenant with the salt of its prefix cache.

Tenants never share KV blocks: their salts differ, and a salt comes from the authenticated key alone, never from
a request. Without any tenant configured the gateway is open to one anonymous tenant without a salt.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from gateway.errors import NotAuthenticated
from gateway.settings import Tenant

_SALT_CONTEXT = b"peerkv tenant salt v1"


@dataclass(frozen=True, slots=True)
class TenantContext:
    """What the rest of the gateway knows about a caller. `salt` is "" for the anonymous tenant."""

    name: str
    salt: str


ADMIN = "admin"
ANONYMOUS = TenantContext(name="anonymous", salt="")


def default_salt(tenant: Tenant) -> str:
    """HMAC-SHA256 of the name, keyed with the API key: 64 hex digits that only the key's holders can derive."""
    key = tenant.api_key.get_secret_value().encode()
    return hmac.new(key, _SALT_CONTEXT + tenant.name.encode(), hashlib.sha256).hexdigest()


def bearer_token(authorization: bytes | None) -> bytes | None:
    """Return the token of an `Authorization: Bearer …` header, None if there is none."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


class Tenants:
    """The configured tenants; `authenticate` is called once per request.

    If there are tenants, the holder of the admin key is one more.
    """

    def __init__(self, tenants: Sequence[Tenant], admin_key: SecretStr | None = None) -> None:
        callers = list(tenants)
        if callers and admin_key is not None:
            callers.append(Tenant(name=ADMIN, api_key=admin_key))
        self._entries = tuple(
            (
                _digest(tenant.api_key.get_secret_value().encode()),
                TenantContext(
                    name=tenant.name,
                    salt=tenant.salt.get_secret_value() if tenant.salt else default_salt(tenant),
                ),
            )
            for tenant in callers
        )

    def __len__(self) -> int:
        """How many there may be; where nobody needs a key, the anonymous one."""
        return len(self._entries) or 1

    def named(self, name: str) -> TenantContext | None:
        """Return the tenant of that name, None if there is none; without configured tenants "" names the anonymous one."""
        if self.open:
            return ANONYMOUS if name in ("", ANONYMOUS.name) else None
        return next((context for _, context in self._entries if context.name == name), None)

    @property
    def open(self) -> bool:
        """True if no tenant is configured and nobody needs a key."""
        return not self._entries

    def authenticate(self, authorization: bytes | None) -> TenantContext:
        """Return the tenant whose key the header carries.

        All keys are compared, each in constant time, so the time taken reveals nothing about a key.
        Raises NotAuthenticated.
        """
        if not self._entries:
            return ANONYMOUS
        token = bearer_token(authorization)
        if token is None:
            raise NotAuthenticated("No API key given. Send 'Authorization: Bearer <key>'.")
        given = _digest(token)
        found: TenantContext | None = None
        for digest, context in self._entries:
            if hmac.compare_digest(digest, given):
                found = context
        if found is None:
            raise NotAuthenticated
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
