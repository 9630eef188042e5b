"""The admin application: health, readiness, metrics, what the caches hold, and the OpenAPI document.

`/health`, `/ready` and `/openapi.json` are open. `/metrics` and `/kv/*` follow the admin rule of gateway/tenants/access.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engine.fleet import FleetView
from gateway.admin.health import _add_open_routes
from gateway.admin.kv_routes import Figures, _add_figures, _add_flush, _Guard
from gateway.admin.openapi import describe
from gateway.admin.prefix_routes import PrefixKeeper, add_prefix_routes
from gateway.api import v1_routes
from gateway.errors import (
    ApiError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    UnknownPath,
)
from gateway.tenants.access import AdminAccess
from gateway.upstream.pool import Upstream


def build_app(
    *,
    fleet: FleetView,
    upstream: Upstream,
    figures: Figures,
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
    _add_open_routes(app, fleet, figures, draining)
    guard = _Guard(access)
    _add_figures(app, figures, guard)
    _add_flush(app, fleet, upstream, keeper, guard)
    add_prefix_routes(app, keeper, body_bytes_max, refusals=guard.refusals, guarded=guard.guarded)
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
            return _answer(MethodNotAllowed(method, path, (error.headers or {}).get("Allow", "").split(", ")))
        return _answer(InvalidRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return _answer(InternalError())


def _answer(error: ApiError) -> Response:
    return JSONResponse(msgspec.json.decode(error.body()), status_code=error.status, headers=error.headers)
