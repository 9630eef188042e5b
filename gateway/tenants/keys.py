"""API keys as the keys file holds them: who has one, until when, and what its holder may do and use up."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

TOKEN_PREFIX = "sk-peerkv-"
TOKEN_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
RESERVED_TENANTS = frozenset({"admin", "anonymous"})
CLASSES = ("high", "normal", "low")
"""Of requests that wait for their turn, each class goes before those behind it."""
NORMAL = CLASSES.index("normal")
DIGEST_CHARS = 64
_DIGEST = rf"^[0-9a-f]{{{DIGEST_CHARS}}}$"


def new_token() -> str:
    """A new key: 256 random bits, behind a prefix by which scanners for leaked secrets can know it."""
    return TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)


def digest_of(token: bytes) -> bytes:
    """The SHA-256 of a key. Keys are random, so nothing slower is needed to keep them from being guessed."""
    return hashlib.sha256(token).digest()


def _moment(value: Any) -> Any:
    """A date of TOML is its beginning, and a time without an offset is UTC."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


def _is_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise ValueError(
            "must begin with a letter or digit and have only letters, digits and . _ @ + -, 128 characters at most"
        )
    return name


def _not_reserved(tenant: str) -> str:
    if tenant in RESERVED_TENANTS:
        raise ValueError(f"'{tenant}' is the name of another caller")
    return tenant


Moment = Annotated[datetime, BeforeValidator(_moment)]
Name = Annotated[str, AfterValidator(_is_name)]
TenantName = Annotated[Name, AfterValidator(_not_reserved)]
Positive = Annotated[int | None, Field(ge=1, le=1 << 53)]


class KeyLimits(BaseModel):
    """What the holder of one key may use up; None is no limit. Tokens are weighed with their prices (gateway/limits/)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_minute: Positive = Field(None, description="requests in any 60 s")
    tokens_per_minute: Positive = Field(None, description="tokens in any 60 s")
    requests_in_flight_max: Positive = Field(None, description="concurrent requests")
    tokens_in_flight_max: Positive = Field(None, description="tokens that all concurrent requests may come to")
    tokens_per_day: Positive = Field(None, description="budget of a day, in UTC")
    tokens_per_month: Positive = Field(None, description="budget of a month, in UTC")
    n_max: Positive = Field(None, description="largest `n` of a request")
    max_tokens_max: Positive = Field(None, description="largest `max_tokens` of a request, and that of requests without")

    @property
    def bounds_tokens(self) -> bool:
        """Whether there is a limit on tokens, so that it has to be known beforehand how many a request may come to."""
        return (
            self.tokens_per_minute is not None
            or self.tokens_per_day is not None
            or self.tokens_per_month is not None
            or self.tokens_in_flight_max is not None
            or self.max_tokens_max is not None
        )

    @property
    def is_counted(self) -> bool:
        """Whether requests or tokens have to be counted, beside what a single request may ask for."""
        return (
            self.requests_per_minute is not None
            or self.tokens_per_minute is not None
            or self.tokens_per_day is not None
            or self.tokens_per_month is not None
            or self.requests_in_flight_max is not None
            or self.tokens_in_flight_max is not None
        )


class Key(KeyLimits):
    """One key: of itself only the digest is known. `former_sha256` is that of the key which it replaced."""

    name: Name
    tenant: TenantName
    sha256: str = Field(pattern=_DIGEST)
    former_sha256: str | None = Field(None, pattern=_DIGEST)
    former_expires: Moment | None = None
    created: Moment | None = None
    expires: Moment | None = None
    revoked: Moment | None = None
    group: Name | None = Field(None, description="tenants of one group share a prefix cache; none: it is the tenant's alone")
    priority: Literal["high", "normal", "low"] = "normal"
    accepts_loss: bool = False
    models: tuple[str, ...] = Field((), description="models that it may name; none: all")

    @model_validator(mode="before")
    @classmethod
    def _tenant_by_name(cls, values: Any) -> Any:
        return {"tenant": values["name"], **values} if isinstance(values, dict) and "name" in values else values

    @property
    def is_limited(self) -> bool:
        """Whether anything of what it uses has to be counted or checked."""
        return bool(self.models) or any(getattr(self, name) is not None for name in KeyLimits.model_fields)

    def state(self, now: datetime) -> str:
        """active, expired or revoked."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "active"


class Keys(BaseModel):
    """The content of a keys file. `salt_secret` is what salts are made with, where the settings have no secret for that."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt_secret: str = Field(pattern=_DIGEST)
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Keys:
        names = [key.name for key in self.keys]
        if len(set(names)) != len(names):
            raise ValueError("two keys have the same name")
        digests = [digest for key in self.keys for digest in (key.sha256, key.former_sha256) if digest]
        if len(set(digests)) != len(digests):
            raise ValueError("two keys have the same sha256")
        groups: dict[str, str | None] = {}
        for key in self.keys:
            if groups.setdefault(key.tenant, key.group) != key.group:
                raise ValueError(f"keys of the tenant '{key.tenant}' are of different groups, and a tenant has one cache")
        return self

    def named(self, name: str) -> Key | None:
        """The key of that name."""
        return next((key for key in self.keys if key.name == name), None)

    def group_of(self, tenant: str) -> str | None:
        """The group of a tenant's keys."""
        return next((key.group for key in self.keys if key.tenant == tenant), None)

    def with_key(self, key: Key) -> Keys:
        """The same with `key` in place of the one of its name, or added."""
        others = [key if each.name == key.name else each for each in self.keys]
        return self.model_copy(update={"keys": tuple(others if key in others else [*others, key])})


def no_keys() -> Keys:
    """An empty file's content, with a new secret."""
    return Keys(salt_secret=secrets.token_bytes(TOKEN_BYTES).hex())
