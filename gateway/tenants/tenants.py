"""Who calls: an API key becomes a tenant with the salt of its prefix cache.

Tenants never share KV blocks: their salts differ, and a salt comes from the authenticated key alone, never from
a request. Without any tenant configured the gateway is open to one anonymous tenant without a salt.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import SecretStr

from gateway.errors import NotAuthenticated
from gateway.settings import Tenant
from gateway.tenants.keys import CLASSES, NORMAL, Key, Keys, digest_of

_SALT_CONTEXT = b"peerkv tenant salt v1"
TENANTS_OF_A_FILE = 16
"""So many are reckoned with where a keys file may add some at any time (prompts/tokenizer/tenant_encoders.py)."""


@dataclass(frozen=True, slots=True)
class TenantContext:
    """What the rest of the gateway knows about a caller. `salt` is "" for the anonymous tenant.

    `key` is the one that was sent, if there is something to count or to check of what it is used for, `rank` the place of
    its class in keys.CLASSES.
    """

    name: str
    salt: str
    key: Key | None = None
    rank: int = NORMAL


ADMIN = "admin"
ANONYMOUS = TenantContext(name="anonymous", salt="")


def default_salt(tenant: Tenant) -> str:
    """HMAC-SHA256 of the name, keyed with the API key: 64 hex digits that only the key's holders can derive."""
    key = tenant.api_key.get_secret_value().encode()
    return hmac.new(key, _SALT_CONTEXT + tenant.name.encode(), hashlib.sha256).hexdigest()


def derived_salt(secret: str, tenant: str) -> str:
    """The salt of a tenant of a keys file: HMAC-SHA256 of its name, so that all its keys share a cache, and new ones too."""
    return hmac.new(bytes.fromhex(secret), _SALT_CONTEXT + tenant.encode(), hashlib.sha256).hexdigest()


def bearer_token(authorization: bytes | None) -> bytes | None:
    """Return the token of an `Authorization: Bearer …` header, None if there is none."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key of the file and its holder. `expires` is Unix time; `over` says why it is no longer taken."""

    digest: bytes
    context: TenantContext
    expires: float | None
    over: str


class Tenants:
    """The configured tenants, and those of a keys file once `use` was called; `authenticate` is called once per request.

    If there are tenants, the holder of the admin key is one more. `clock` gives Unix time in seconds.
    """

    def __init__(
        self,
        tenants: Sequence[Tenant],
        admin_key: SecretStr | None = None,
        keys: Keys | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        callers = list(tenants)
        if (callers or keys is not None) and admin_key is not None:
            callers.append(Tenant(name=ADMIN, api_key=admin_key))
        self._entries = tuple(
            (
                digest_of(tenant.api_key.get_secret_value().encode()),
                TenantContext(
                    name=tenant.name,
                    salt=tenant.salt.get_secret_value() if tenant.salt else default_salt(tenant),
                ),
            )
            for tenant in callers
        )
        self._clock = clock
        self._keys: Keys | None = None
        self._by_digest: dict[bytes, _Entry] = {}
        if keys is not None:
            self.use(keys)

    def use(self, keys: Keys) -> None:
        """Take these keys from now on, in place of those of the file before."""
        salts = {context.name: context.salt for _, context in self._entries}
        found: dict[bytes, _Entry] = {}
        for key in keys.keys:
            salt = salts.get(key.tenant) or derived_salt(keys.salt_secret, key.tenant)
            context = TenantContext(key.tenant, salt, key if key.is_limited else None, CLASSES.index(key.priority))
            expires = None if key.expires is None else key.expires.timestamp()
            over = "This API key was revoked." if key.revoked is not None else ""
            for digest, end in ((key.sha256, None), (key.former_sha256, key.former_expires)):
                if digest is not None:
                    ends = [each for each in (expires, None if end is None else end.timestamp()) if each is not None]
                    raw = bytes.fromhex(digest)
                    found[raw] = _Entry(raw, context, min(ends, default=None), over)
        self._keys, self._by_digest = keys, found

    @property
    def keys(self) -> Keys | None:
        """The content of the keys file; None without one."""
        return self._keys

    def __len__(self) -> int:
        """How many there may be; where nobody needs a key, the anonymous one."""
        return len(self._entries) + (TENANTS_OF_A_FILE if self._keys is not None else 0) or 1

    def named(self, name: str) -> TenantContext | None:
        """Return the tenant of that name, None if there is none; without configured tenants "" names the anonymous one."""
        if self.open:
            return ANONYMOUS if name in ("", ANONYMOUS.name) else None
        found = next((context for _, context in self._entries if context.name == name), None)
        if found is None and self._keys is not None and any(key.tenant == name for key in self._keys.keys):
            found = TenantContext(name, derived_salt(self._keys.salt_secret, name))
        return found

    @property
    def open(self) -> bool:
        """True if no tenant is configured and nobody needs a key."""
        return not self._entries and self._keys is None

    def authenticate(self, authorization: bytes | None) -> TenantContext:
        """Return the tenant whose key the header carries.

        The keys of the settings, which people choose, are all compared, each in constant time, so the time taken reveals
        nothing about a key. Those of a file are random: they are found by their digests, and compared in constant time.
        Raises NotAuthenticated.
        """
        if not self._entries and self._keys is None:
            return ANONYMOUS
        token = bearer_token(authorization)
        if token is None:
            raise NotAuthenticated("No API key given. Send 'Authorization: Bearer <key>'.")
        given = digest_of(token)
        found: TenantContext | None = None
        for digest, context in self._entries:
            if hmac.compare_digest(digest, given):
                found = context
        entry = self._by_digest.get(given)
        if entry is not None and hmac.compare_digest(entry.digest, given):
            if entry.over or (entry.expires is not None and entry.expires <= self._clock()):
                raise NotAuthenticated(entry.over or "This API key has expired.")
            return entry.context
        if found is None:
            raise NotAuthenticated
        return found
