"""`/health` and `/ready`: open to everybody."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from engine.fleet import FleetView

READY_RETRY_SECONDS = 5


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


def _add_open_routes(app: FastAPI, fleet: FleetView, draining: Callable[[], bool]) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["admin"], summary="The gateway lives")
    async def health() -> Health:
        return Health()

    @app.head("/ready", include_in_schema=False)
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
