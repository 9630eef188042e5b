"""The admin application: health, readiness, metrics, what the caches hold, and the OpenAPI document.

`/health`, `/ready` and `/openapi.json` are open. `/metrics` and `/kv/*` follow the admin rule of gateway/access.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from engine.fleet import FleetView, Replica
from gateway import v1_routes
from gateway.access import AdminAccess
from gateway.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NoReplicaReady,
    UnknownPath,
    UnknownRequest,
)
from gateway.explain import Explanation
from gateway.openapi import describe
from gateway.prefix_routes import PrefixKeeper, add_prefix_routes
from gateway.prefixes import PrefixReport
from gateway.shapes import ErrorAnswer
from gateway.stats import KvStats
from gateway.upstream import Upstream, UpstreamLost

READY_RETRY_SECONDS = 5
PREFIXES_SHOWN_MAX = 1000


class Sight(Protocol):
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

    def metrics(self) -> tuple[bytes, str]:
        """The body of /metrics and its content type."""
        ...


class Health(BaseModel):
    """The gateway lives."""

    status: str = "ok"


class ReplicaReadiness(BaseModel):
    """One replica: `reason` says why it is not ready."""

    name: str
    ready: bool
    state: str = Field(description="starting, ready, draining, backoff, failed or stopped")
    reason: str
    restarts: int
    device: str


class Readiness(BaseModel):
    """Whether requests can be served now."""

    ready: bool
    reason: str = Field(description="why not, empty when ready")
    model: str
    replicas: list[ReplicaReadiness]


class Flushed(BaseModel):
    """Which replicas emptied their prefix caches, and why the others did not."""

    flushed: list[str]
    failed: dict[str, str]


def build_app(
    *,
    fleet: FleetView,
    upstream: Upstream,
    sight: Sight,
    access: AdminAccess,
    keeper: PrefixKeeper,
    body_bytes_max: int,
    draining: Callable[[], bool],
) -> FastAPI:
    """The FastAPI application. It describes `/v1/*` too, which the front door serves.

    `body_bytes_max` bounds the bodies that it reads.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_error_forms(app)
    app.include_router(v1_routes.router)
    _add_open_routes(app, fleet, draining)
    guard = _Guard(access)
    _add_admin_routes(app, fleet, upstream, sight, guard)
    add_prefix_routes(app, keeper, body_bytes_max, refusals=guard.refusals, guarded=guard.guarded)
    document = describe(app)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        return JSONResponse(document)

    return app


def _add_open_routes(app: FastAPI, fleet: FleetView, draining: Callable[[], bool]) -> None:
    @app.get("/health", tags=["admin"], summary="The gateway lives")
    async def health() -> Health:
        return Health()

    @app.get(
        "/ready",
        tags=["admin"],
        summary="At least one replica serves",
        responses={503: {"model": Readiness, "description": "No replica serves, or the gateway stops"}},
    )
    async def ready(response: Response) -> Readiness:
        readiness = readiness_of(fleet, draining=draining())
        if not readiness.ready:
            response.status_code = 503
            response.headers["retry-after"] = str(READY_RETRY_SECONDS)
        return readiness


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


def _add_admin_routes(app: FastAPI, fleet: FleetView, upstream: Upstream, sight: Sight, guard: _Guard) -> None:
    refusals, guarded = guard.refusals, guard.guarded

    @app.get("/metrics", summary="Prometheus metrics", response_class=PlainTextResponse, responses=refusals, **guarded)
    async def metrics() -> Response:
        body, content_type = sight.metrics()
        return Response(body, headers={"content-type": content_type})

    @app.get("/kv/stats", summary="Where prompt tokens came from, by replica and in all", responses=refusals, **guarded)
    async def stats() -> KvStats:
        return sight.stats()

    @app.get(
        "/kv/prefixes",
        summary="The most used prefixes and who holds them, and those that are kept",
        responses=refusals,
        **guarded,
    )
    async def prefixes(limit: Annotated[int, Query(ge=1, le=PREFIXES_SHOWN_MAX)] = 50) -> PrefixReport:
        return sight.prefixes(limit)

    @app.get(
        "/kv/explain/{request_id}",
        summary="What was decided for a recent request, what was delivered, and why it was not more",
        responses={**refusals, 404: {"model": ErrorAnswer, "description": "The ledger knows no such request (any more)"}},
        **guarded,
    )
    async def explain(
        request_id: Annotated[str, Path(description="the header x-request-id of its answer", max_length=128)],
    ) -> Explanation:
        found = sight.explain(request_id)
        if found is None:
            raise UnknownRequest(request_id)
        return found

    @app.post(
        "/kv/flush",
        summary="Empty the prefix caches of all ready replicas",
        responses={
            **refusals,
            502: {"model": Flushed, "description": "Not all of them were emptied"},
            503: {"model": ErrorAnswer, "description": "No replica is ready"},
        },
        **guarded,
    )
    async def flush(response: Response) -> Flushed:
        flushed = await flush_caches(fleet, upstream)
        if flushed.failed:
            response.status_code = 502
        return flushed


def readiness_of(fleet: FleetView, *, draining: bool) -> Readiness:
    """The fleet as /ready shows it."""
    snapshot = fleet.snapshot()
    ready = {replica.name for replica in snapshot.ready()}
    if draining:
        reason = "the gateway is stopping"
    elif not snapshot.replicas:
        reason = "there are no replicas yet"
    else:
        reason = "" if ready else "no replica is ready"
    return Readiness(
        ready=bool(ready) and not draining,
        reason=reason,
        model=snapshot.served_model_name,
        replicas=[
            ReplicaReadiness(
                name=replica.name,
                ready=replica.name in ready,
                state=str(replica.state),
                reason=replica.reason,
                restarts=replica.restarts,
                device=replica.device,
            )
            for replica in snapshot.replicas
        ],
    )


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


def _add_error_forms(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return _answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        return _answer(InvalidRequest(f"'{name}': {first['msg']}", param=name))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path
        if error.status_code == 404:
            return _answer(UnknownPath(method, path))
        if error.status_code == 405:
            return _answer(MethodNotAllowed(method, path, (error.headers or {}).get("Allow", "").split(", ")))
        return _answer(InvalidRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return _answer(InternalError())


def _answer(error: ApiError) -> Response:
    return JSONResponse(msgspec.json.decode(error.body()), status_code=error.status, headers=error.headers)
