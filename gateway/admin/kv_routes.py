"""`/metrics` and `/kv/*`, which follow the admin rule of gateway/tenants/access.py."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from engine.fleet import FleetView, Replica
from gateway.admin.health import Outlook
from gateway.admin.prefix_routes import PrefixKeeper
from gateway.api.shapes import ErrorAnswer
from gateway.errors import (
    NoReplicaReady,
    UnknownRequest,
)
from gateway.kept_prefixes.shapes import FlushedPrefixes, PrefixReport
from gateway.stats.explain import ID_CHARS_MAX, Explanation
from gateway.stats.shapes import KvStats
from gateway.tenants.access import AdminAccess
from gateway.upstream.pool import Upstream, UpstreamLost

PREFIXES_SHOWN_MAX = 1000


class Figures(Outlook, Protocol):
    """What there is to see of the replicas' caches."""

    def stats(self) -> KvStats:
        """The body of /kv/stats."""
        ...

    def prefixes(self, limit: int) -> PrefixReport:
        """The body of /kv/prefixes: the `limit` most used ones."""
        ...

    def explain(self, request_id: str) -> Explanation | None:
        """The body of /kv/explain/{request_id}; None if the ledger has nothing under that id."""
        ...

    async def metrics(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        ...


class Flushed(BaseModel):
    """Which replicas emptied their prefix caches, and why the others did not."""

    flushed: list[str]
    failed: dict[str, str]
    prefixes: FlushedPrefixes = Field(default_factory=FlushedPrefixes)


class _Guard:
    """The admin rule: `guarded` goes to a route, `refusals` into its responses."""

    def __init__(self, access: AdminAccess) -> None:
        async def admin(request: Request) -> None:
            access.check(request.scope)

        self.refusals: dict[int | str, dict[str, Any]] = {
            401: {"model": ErrorAnswer, "description": "The admin key is missing or wrong"},
            403: {"model": ErrorAnswer, "description": "There is no admin key, and the caller is not on this machine"},
        }
        self.guarded: dict[str, Any] = {"tags": ["admin"], "dependencies": [Depends(admin)]}


def _add_figures(app: FastAPI, figures: Figures, guard: _Guard) -> None:
    refusals, guarded = guard.refusals, guard.guarded

    @app.get(
        "/metrics",
        summary="Prometheus metrics, vLLM's own of all replicas among them",
        response_class=PlainTextResponse,
        responses=refusals,
        **guarded,
    )
    async def metrics() -> Response:
        body, content_type = await figures.metrics()
        return Response(body, headers={"content-type": content_type})

    @app.get("/kv/stats", summary="Where prompt tokens came from, by replica and in all", responses=refusals, **guarded)
    async def stats() -> KvStats:
        return figures.stats()

    @app.get(
        "/kv/prefixes",
        summary="The most used prefixes and who holds them, and those that are kept",
        responses=refusals,
        **guarded,
    )
    async def prefixes(limit: Annotated[int, Query(ge=1, le=PREFIXES_SHOWN_MAX)] = 50) -> PrefixReport:
        return figures.prefixes(limit)

    @app.get(
        "/kv/explain/{request_id}",
        summary="What was decided for a recent request, what was delivered, and why it was not more",
        responses={**refusals, 404: {"model": ErrorAnswer, "description": "The ledger knows no such request (any more)"}},
        **guarded,
    )
    async def explain(
        request_id: Annotated[
            str, Path(description="of its answer: the header x-request-id, or the body's id", max_length=ID_CHARS_MAX)
        ],
    ) -> Explanation:
        found = figures.explain(request_id)
        if found is None:
            raise UnknownRequest(request_id)
        return found


def _add_flush(app: FastAPI, fleet: FleetView, upstream: Upstream, keeper: PrefixKeeper, guard: _Guard) -> None:
    @app.post(
        "/kv/flush",
        summary="Empty the prefix caches of all ready replicas; of pinned prefixes only renewed ones are put back",
        responses={
            **guard.refusals,
            502: {"model": Flushed, "description": "Not all of them were emptied"},
            503: {"model": ErrorAnswer, "description": "No replica is ready"},
        },
        **guard.guarded,
    )
    async def flush(response: Response) -> Flushed:
        flushed = await flush_caches(fleet, upstream)
        flushed.prefixes = keeper.flushed(flushed.flushed, flushed.failed)
        if flushed.failed:
            response.status_code = 502
        return flushed


async def flush_caches(fleet: FleetView, upstream: Upstream) -> Flushed:
    """Have every ready replica forget its cached blocks. Raises NoReplicaReady."""
    replicas = fleet.snapshot().ready()
    if not replicas:
        raise NoReplicaReady
    reasons = await asyncio.gather(*(_flush(replica, upstream) for replica in replicas))
    outcome = dict(zip((replica.name for replica in replicas), reasons, strict=True))
    return Flushed(
        flushed=[name for name, reason in outcome.items() if not reason],
        failed={name: reason for name, reason in outcome.items() if reason},
    )


async def _flush(replica: Replica, upstream: Upstream) -> str:
    """Empty one replica's cache; the reason if that did not happen, else ""."""
    try:
        raw = await upstream.post_control(replica, "/reset_prefix_cache", {"reset_external": "true"})
        done = msgspec.json.decode(raw)["success"] if raw else True
    except (UpstreamLost, msgspec.MsgspecError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if done else "requests are using its blocks; try again when they are done"
