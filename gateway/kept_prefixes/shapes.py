"""Requests and answers of POST and DELETE /kv/prefixes."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gateway.kept_prefixes.book import KeptPrefixAnswer
from transport.hint import PIN_SECONDS_MAX

TTL_SECONDS_DEFAULT = 3600.0
TOKEN_ID_MAX = 2**31 - 1
_KINDS = ("text", "messages", "ids")


class PrefixRequest(BaseModel):
    """A prefix to keep: one of `text`, `messages` and `ids`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | None = Field(None, min_length=1, description="the beginning of completions' prompts")
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, description="the first messages of chats")
    ids: list[int] | None = Field(None, min_length=1, description="token ids")
    tools: list[dict[str, Any]] | None = Field(None, description="with `messages`: the chats' tools")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="with `messages`: as the chats have them")
    model: str = Field("", description="a LoRA adapter of /v1/models; empty: the served model")
    tenant: str = Field("", description="name of the tenant whose cache keeps it; required if tenants are configured")
    replicas: int = Field(1, ge=1, description="number of replicas that should hold it")
    ttl: float = Field(TTL_SECONDS_DEFAULT, gt=0, le=PIN_SECONDS_MAX, description="seconds to keep it")
    pin: bool = Field(
        True,
        description="protect its blocks from eviction, in host memory and on this node's disk as well;"
        " false: only put them into the caches",
    )
    renew: bool = Field(False, description="renew its ttl before it runs out, until it is deleted")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(_KINDS)}, not {' and '.join(given) or 'none'}")
        if self.messages is None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise ValueError("tools and chat_template_kwargs go with messages")
        if self.ids is not None and not (min(self.ids) >= 0 and max(self.ids) <= TOKEN_ID_MAX):
            raise ValueError("ids: not all of them are token ids")
        return self


class PrefixRemoved(BaseModel):
    """A prefix that is no longer kept. If a replica could not be told, its pin ends when its time is up."""

    id: str
    unpinned: list[str]
    failed: dict[str, str]


class FlushedPrefixes(BaseModel):
    """What became of the kept prefixes when caches were emptied."""

    kept: int = Field(0, description="kept prefixes that were in those caches")
    renewed: int = Field(0, description="those of them that are put back, as they are renewed; the others stay away")


class Prefix(BaseModel):
    """One prefix that requests shared."""

    key: str = Field(description="key of its last block, 32 hex digits")
    tokens: int = Field(description="its length in tokens, in whole blocks; up to an eighth of a long one may be missing")
    requests: int = Field(description="requests that began with it")
    last_used: float = Field(description="Unix time of the last of them, seconds")
    holders: list[str] = Field(description="replicas that hold its last block now")


class PrefixReport(BaseModel):
    """The body of GET /kv/prefixes."""

    tracked_blocks: int = Field(description="block keys counted now")
    tracked_blocks_max: int = Field(description="limit on these; the least recently used are dropped first")
    prefixes: list[Prefix] = Field(description="most requested first")
    kept: list[KeptPrefixAnswer] = Field(default_factory=list, description="those of POST /kv/prefixes, oldest first")
