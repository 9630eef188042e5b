"""Who calls: an API key becomes a tenant with the salt of its prefix cache.

Tenants never share KV blocks, unless they are of one group: their salts differ, and a salt comes from the authenticated key
alone, never from a request. Without any tenant configured the gateway is open to one anonymous tenant without a salt.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pydantic import SecretStr

from gateway.errors import NotAuthenticated
from gateway.settings import Tenant
from gateway.tenants.keys import CLASSES, NORMAL, Key, Keys, digest_of
from gateway.tenants.salts import given_salt, new_secret, salt_of
from transport.table.quality import lossy_salt


@dataclass(frozen=True, slots=True)
class TenantContext:
    """What the rest of the gateway knows about a caller. `salt` is "" for the anonymous tenant.

    `key` is the one that was sent, if there is something to count or to check of what it is used for, `rank` the place of
    its class in keys.CLASSES. `accepts_loss`: the caller takes KV that lost something, if the operator keeps any so.
    """

    name: str
    salt: str
    key: Key | None = None
    rank: int = NORMAL
    accepts_loss: bool = False

    def with_loss(self) -> TenantContext:
        """Return the caller with the salt of its cache of KV that may have lost something."""
        return replace(self, salt=lossy_salt(self.salt))


HEADERS_KEPT_MAX, HEADER_KEPT_BYTES_MAX = 1024, 512
"""Headers with keys that are known again, and the bytes of each: a digest costs more than all else about a key."""
ADMIN = "admin"
ANONYMOUS = TenantContext(name="anonymous", salt="", accepts_loss=True)  # without keys, the operator speaks for all


def bearer_token(authorization: bytes | None) -> bytes | None:
    """Return the token of an `Authorization: Bearer …` header, None if there is none."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key and its holder. `expires` is Unix time; `over` says why it is no longer taken."""

    digest: bytes
    context: TenantContext
    expires: float | None = None
    over: str = ""


class Tenants:
    """The configured tenants, and those of a keys file once `use` was called; `authenticate` is called once per request.

    If there are tenants, the holder of the admin key is one more; if there are none, `allow_anyone` lets other machines call.
    Salts are made with `salt_secret`, without it with that of the keys file, and without that with what `make_secret` returns.
    `clock` gives Unix time in seconds.
    """

    def __init__(
        self,
        tenants: Sequence[Tenant],
        admin_key: SecretStr | None = None,
        keys: Keys | None = None,
        clock: Callable[[], float] = time.time,
        *,
        allow_anyone: bool = False,
        salt_secret: bytes | None = None,
        make_secret: Callable[[], bytes] = new_secret,
    ) -> None:
        self.allow_anyone = allow_anyone
        self._given = (tuple(tenants), admin_key)
        self._clock = clock
        self._keys = keys
        self._salt_secret = salt_secret
        self._make_secret = make_secret
        self._made: bytes | None = None
        self._take()

    def configure(self, tenants: Sequence[Tenant], admin_key: SecretStr | None) -> None:
        """Take these in place of those of the settings from now on; requests that were let in go on.

        Raises what `make_secret` does; then all stays as it is.
        """
        before, self._given = self._given, (tuple(tenants), admin_key)
        try:
            self._take()
        except Exception:
            self._given = before
            raise

    def use(self, keys: Keys) -> None:
        """Take these keys from now on, in place of those of the file before."""
        self._keys = keys
        self._take()

    def _take(self) -> None:
        """Make salts and contexts anew: tenants of the file may have salts in the settings."""
        keys, secret = self._keys, self._secret()
        self._entries = _entries(*self._given, secret, with_keys=keys is not None)
        salts = {entry.context.name: entry.context.salt for entry in self._entries}
        found: dict[bytes, _Entry] = {}
        for key in () if keys is None else keys.keys:
            salt = salts.get(key.tenant) or salt_of(secret, key.tenant, key.group)
            rank = CLASSES.index(key.priority)
            context = TenantContext(key.tenant, salt, key if key.is_limited else None, rank, key.accepts_loss)
            expires = None if key.expires is None else key.expires.timestamp()
            over = "This API key was revoked." if key.revoked is not None else ""
            for digest, end in ((key.sha256, None), (key.former_sha256, key.former_expires)):
                if digest is not None:
                    ends = [each for each in (expires, None if end is None else end.timestamp()) if each is not None]
                    raw = bytes.fromhex(digest)
                    found[raw] = _Entry(raw, context, min(ends, default=None), over)
        self._by_digest = found
        self._lately: dict[bytes | None, _Entry] = {}  # by the headers that named them
        self._count = len({entry.context.salt for entry in (*self._entries, *found.values()) if not entry.over})

    def _secret(self) -> bytes:
        """What salts are made with; nothing is made for callers that have none."""
        if self._salt_secret is not None:
            return self._salt_secret
        if self._keys is not None:
            return bytes.fromhex(self._keys.salt_secret)
        if self._made is None and self._given[0]:
            self._made = self._make_secret()
        return self._made or b""

    @property
    def keys(self) -> Keys | None:
        """The content of the keys file; None without one."""
        return self._keys

    def __len__(self) -> int:
        """How many there are with caches of their own; those whose keys have all been revoked do not count."""
        return self._count

    def named(self, name: str) -> TenantContext | None:
        """Return the tenant of that name, None if there is none; without configured tenants "" names the anonymous one.

        It accepts loss if all its keys do, those that were revoked aside.
        """
        if self.open:
            return ANONYMOUS if name in ("", ANONYMOUS.name) else None
        found = [entry.context for entry in (*self._entries, *self._by_digest.values()) if entry.context.name == name]
        live = [entry.context for entry in (*self._entries, *self._by_digest.values()) if not entry.over]
        accepts_loss = all(context.accepts_loss for context in live if context.name == name)
        return TenantContext(name, found[0].salt, accepts_loss=accepts_loss) if found else None

    @property
    def open(self) -> bool:
        """True if no tenant is configured and nobody needs a key."""
        return not self._entries and self._keys is None

    def authenticate(self, authorization: bytes | None) -> TenantContext:
        """Return the tenant whose key the header carries.

        The keys of the settings, which people choose, are all compared, each in constant time, so the time taken reveals
        nothing about a key. Those of a file are random: they are found by their digests, and compared in constant time.
        A header that was right before is found by Python's hash of it, which is keyed anew in each process: only one that is
        the same to the last byte gets as far as a comparison. Raises NotAuthenticated.
        """
        if self.open:
            return ANONYMOUS
        entry = self._lately.get(authorization)
        if entry is None:
            token = bearer_token(authorization)
            if authorization is None or token is None:
                raise NotAuthenticated("No API key given. Send 'Authorization: Bearer <key>'.")
            entry = self._find(token)
            if len(authorization) <= HEADER_KEPT_BYTES_MAX:
                if len(self._lately) >= HEADERS_KEPT_MAX:
                    self._lately.clear()
                self._lately[authorization] = entry
        if entry.over or (entry.expires is not None and entry.expires <= self._clock()):
            raise NotAuthenticated(entry.over or "This API key has expired.")
        return entry.context

    def _find(self, token: bytes) -> _Entry:
        given = digest_of(token)
        found: _Entry | None = None
        for entry in (*self._entries, self._by_digest.get(given)):
            if entry is not None and hmac.compare_digest(entry.digest, given):
                found = entry
        if found is None:
            raise NotAuthenticated
        return found


def _entries(tenants: Sequence[Tenant], admin_key: SecretStr | None, secret: bytes, *, with_keys: bool) -> tuple[_Entry, ...]:
    """The settings' keys."""
    callers = list(tenants)
    if (callers or with_keys) and admin_key is not None:
        callers.append(Tenant(name=ADMIN, api_key=admin_key))
    return tuple(
        _Entry(
            digest_of(tenant.api_key.get_secret_value().encode()),
            TenantContext(
                name=tenant.name,
                salt=_salt(tenant, secret),
                accepts_loss=tenant.accepts_loss,
            ),
        )
        for tenant in callers
    )


def _salt(tenant: Tenant, secret: bytes) -> str:
    return given_salt(tenant.salt.get_secret_value()) if tenant.salt else salt_of(secret, tenant.name, tenant.group)
