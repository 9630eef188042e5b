"""What is shown of limits: in /kv/stats, and for Prometheus in the same shape."""

from __future__ import annotations

from pydantic import BaseModel, Field

from gateway.limits.account import Limit

OTHER_REASONS = ("model", "size")
"""Beside the limits: a model that the key may not use, and `n` or `max_tokens` beyond what it may."""


def by_limit() -> dict[str, int]:
    """A count for each reason to refuse a request."""
    return dict.fromkeys((*map(str, Limit), *OTHER_REASONS), 0)


class LimitUse(BaseModel):
    """A limit of one key, and what counts towards it now."""

    limit: int
    used: int


class KeyUse(BaseModel):
    """One key with limits, by its name in the keys file."""

    key: str
    requests_in_flight: int
    limits: dict[str, LimitUse] = Field(description="by the name of the setting; tokens are weighed with their prices")


class TenantUse(BaseModel):
    """What a tenant's keys with limits were used for. Counts begin with the gateway's start."""

    tenant: str
    requests: int = Field(0, description="requests that were let in")
    uncached_tokens: int = Field(0, description="prompt tokens that were computed")
    cached_tokens: int = Field(0, description="prompt tokens that came from a cache or another replica")
    generated_tokens: int = Field(0, description="tokens of answers")
    charged_tokens: int = Field(0, description="all of them, weighed with their prices")
    refused: dict[str, int] = Field(default_factory=by_limit, description="requests refused, by the limit that was reached")
    keys: list[KeyUse] = []


class QueueStats(BaseModel):
    """Requests that waited for room at the replicas (`replica_requests_max`), since the gateway's start."""

    waiting_requests: int = Field(0, description="requests that wait now")
    waited_requests: int = Field(0, description="requests that had to wait, also those that gave up")
    waited_seconds: float = Field(0.0, description="how long they waited, together")
    refused_requests: int = Field(0, description="requests that found no place, or whose turn did not come in time")


class SharedLimitStats(BaseModel):
    """The server that counts limits for several gateways (`limits_valkey`), as this one found it since its start."""

    up: int = Field(0, description="1 while there is a connection, else 0")
    alone_requests: int = Field(0, description="requests let in by this gateway's own count, as the server gave no answer")
    failures: int = Field(0, description="connections that could not be made or broke, and answers that were errors")
    waiting_settlements: int = Field(
        0, description="settlements that the server has not confirmed, added up by key while it is gone"
    )
    lost_settlements: int = Field(0, description="settlements that the server refused: what they were for is not counted there")
