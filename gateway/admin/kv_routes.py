"""`/metrics` and `/kv/*`, under the admin rule."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from engine.fleet import FleetView, Replica
from gateway.admin.health import OfModel, Outlook
from gateway.admin.prefix_routes import PrefixKeeper
from gateway.api.shapes import ErrorAnswer
from gateway.errors import NoReplicaReady, UnknownRequest
from gateway.kept_prefixes.shapes import FlushedPrefixes, PrefixReport
from gateway.stats.explain import ID_CHARS_MAX, Explanation
from gateway.stats.shapes import KvStats
from gateway.upstream.pool import Upstream, UpstreamLost
from transport.node.names import node_of

PREFIXES_SHOWN_MAX = 1000


class Figures(Outlook, Protocol):
    """What there is to see of the replicas' caches."""

    def stats(self, model: str = "") -> KvStats:
        """The body of /kv/stats, of the first model if none is named. Raises UnknownModel."""
        ...

    def prefixes(self, limit: int, model: str = "") -> PrefixReport:
        """The body of /kv/prefixes: the `limit` most used ones of a model, the first if none is named. Raises UnknownModel."""
        ...

    def explain(self, request_id: str) -> Explanation | None:
        """The body of /kv/explain/{request_id}; None if the ledger has nothing under that id."""
        ...

    async def metrics(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        ...


_NO_SUCH_MODEL: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "There is no such model"}}

FlushTiers = Callable[[], Awaitable[dict[str, str]]]


async def nothing_below() -> dict[str, str]:
    """There is neither disk nor vault."""
    return {}


class Flushed(BaseModel):
    """Which replicas emptied their prefix caches, disk and vault among them, and why the others did not.

    Replicas of other nodes are emptied too; a node that is not heard has failed, by its name.
    """

    flushed: list[str]
    failed: dict[str, str]
    prefixes: FlushedPrefixes = Field(default_factory=FlushedPrefixes)
    disks_left: list[str] = Field(
        [], description="other nodes whose replicas were emptied: a disk of such a node is emptied by its own gateway alone"
    )


def add_figure_routes(router: APIRouter, figures: Figures) -> None:
    """Add what only reads to the admin router."""

    @router.get(
        "/metrics",
        summary="Prometheus metrics, vLLM's own of all replicas among them",
        response_class=PlainTextResponse,
    )
    async def metrics() -> Response:
        body, content_type = await figures.metrics()
        return Response(body, headers={"content-type": content_type})

    @router.get("/kv/stats", summary="Where prompt tokens came from, by replica and in all", responses=_NO_SUCH_MODEL)
    async def stats(model: OfModel = "") -> KvStats:
        return figures.stats(model)

    @router.get(
        "/kv/prefixes",
        summary="The most used prefixes and who holds them, and those that are kept",
        responses=_NO_SUCH_MODEL,
    )
    async def prefixes(limit: Annotated[int, Query(ge=1, le=PREFIXES_SHOWN_MAX)] = 50, model: OfModel = "") -> PrefixReport:
        return figures.prefixes(limit, model)

    @router.get(
        "/kv/explain/{request_id}",
        summary="What was decided for a recent request, what was delivered, and why it was not more",
        responses={404: {"model": ErrorAnswer, "description": "The ledger knows no such request (any more)"}},
    )
    async def explain(
        request_id: Annotated[
            str,
            Path(
                description="of its answer: the header x-request-id, or the body's id (not that of a Responses answer)",
                max_length=ID_CHARS_MAX,
            ),
        ],
    ) -> Explanation:
        found = figures.explain(request_id)
        if found is None:
            raise UnknownRequest(request_id)
        return found


def add_flush_route(
    router: APIRouter, fleets: Sequence[FleetView], upstream: Upstream, keeper: PrefixKeeper, flush_tiers: FlushTiers
) -> None:
    """Add the route to the admin router."""

    @router.post(
        "/kv/flush",
        summary="Empty all prefix caches, disk and vault too; of pinned prefixes only renewed ones are put back",
        responses={
            502: {"model": Flushed, "description": "Not all of them were emptied"},
            503: {"model": ErrorAnswer, "description": "No replica is ready"},
        },
    )
    async def flush(response: Response) -> Flushed:
        flushed = await flush_caches(fleets, upstream)
        flushed.disks_left = sorted({node for name in flushed.flushed if (node := node_of(name))})
        flushed.prefixes = keeper.flushed(flushed.flushed, flushed.failed)
        for name, why in (await flush_tiers()).items():  # last: what is above them goes down no more
            if why:
                flushed.failed[name] = why
            else:
                flushed.flushed.append(name)
        if flushed.failed:
            response.status_code = 502
        return flushed


async def flush_caches(fleets: Sequence[FleetView], upstream: Upstream) -> Flushed:
    """Have every ready replica forget its cached blocks. Raises NoReplicaReady."""
    replicas = [replica for fleet in fleets for replica in fleet.snapshot().ready()]
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
