"""The admin application: health, readiness, metrics, what the caches hold, and the OpenAPI document.

`/health`, `/ready` and `/openapi.json` are open. `/metrics`, `/kv/*` and `/replicas` follow the admin rule of
gateway/tenants/access.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from engine.fleet import FleetView
from gateway.admin.guard import admin_router
from gateway.admin.health import add_open_routes
from gateway.admin.kv_routes import Figures, FlushTiers, add_figure_routes, add_flush_route, nothing_below
from gateway.admin.openapi import describe
from gateway.admin.prefix_routes import PrefixKeeper, add_prefix_routes
from gateway.admin.replica_routes import ReplicaKeeper, add_replica_routes
from gateway.api import other_routes, v1_routes
from gateway.errors import ApiError, InternalError, InvalidRequest, MethodNotAllowed, UnknownPath
from gateway.tenants.access import AdminAccess
from gateway.upstream.pool import Upstream


def build_app(
    *,
    fleets: Sequence[FleetView],
    upstream: Upstream,
    figures: Figures,
    access: AdminAccess,
    keeper: PrefixKeeper,
    replicas: ReplicaKeeper,
    body_bytes_max: int,
    draining: Callable[[], bool],
    flush_tiers: FlushTiers = nothing_below,
) -> FastAPI:
    """The FastAPI application. It describes `/v1/*` too, which the front door serves.

    `body_bytes_max` bounds the bodies that it reads; `flush_tiers` empties disk and vault, and returns why it did not, by name.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_error_forms(app)
    app.include_router(v1_routes.router)
    app.include_router(other_routes.router)
    add_open_routes(app, fleets, figures, draining)
    for_admins = admin_router(access)
    add_figure_routes(for_admins, figures)
    add_flush_route(for_admins, fleets, upstream, keeper, flush_tiers)
    add_prefix_routes(for_admins, keeper, body_bytes_max)
    add_replica_routes(for_admins, replicas)
    app.include_router(for_admins)
    document = functools.cache(lambda: describe(app))

    @app.get("/openapi.json", include_in_schema=False)
    def openapi() -> JSONResponse:  # in a thread: FastAPI takes half a second of CPU to make the document
        return JSONResponse(document())

    return app


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
            routes = [
                route for route in app.routes if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE
            ]
            return _answer(MethodNotAllowed(method, path, sorted({each for route in routes for each in route.methods or ()})))
        return _answer(InvalidRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return _answer(InternalError())


def _answer(error: ApiError) -> Response:
    return JSONResponse(msgspec.json.decode(error.body()), status_code=error.status, headers=error.headers)
