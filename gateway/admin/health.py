"""`/health` and `/ready`: open to everybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from engine.fleet import FleetView
from gateway.steering.outliers import Ejection, OutlierState

READY_RETRY_SECONDS = 5
NO_REPLICAS = "there are no replicas: `peerkv engine` starts them"  # beside `peerkv serve` there always are


class Outlook(Protocol):
    """What the gateway itself thinks of its replicas."""

    def ejection(self, replica: str) -> Ejection:
        """Whether a replica gets requests, and why not."""
        ...

    def warnings(self) -> list[str]:
        """What keeps replicas that are ready from exchanging KV, and what to do."""
        ...


class Health(BaseModel):
    """The gateway lives."""

    status: str = "ok"


class ReplicaReadiness(BaseModel):
    """One replica: `reason` says why it is not ready."""

    name: str
    ready: bool = Field(description="it is in the state ready, and gets requests")
    state: str = Field(description="starting, ready, draining, backoff, failed or stopped")
    standing: OutlierState = Field(
        description="well; ejected, since its answers failed; half-open, tried with one request at a time; or suspect"
    )
    reason: str
    restarts: int
    device: str


class Readiness(BaseModel):
    """Whether requests can be served now."""

    ready: bool
    reason: str = Field(description="why not, empty when ready")
    model: str
    warnings: list[str] = Field(description="what keeps replicas that are ready from exchanging KV, and what to do")
    replicas: list[ReplicaReadiness]


def _add_open_routes(app: FastAPI, fleet: FleetView, outlook: Outlook, draining: Callable[[], bool]) -> None:
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
        readiness = readiness_of(fleet, outlook, draining=draining())
        if not readiness.ready:
            response.status_code = 503
            response.headers["retry-after"] = str(READY_RETRY_SECONDS)
        return readiness


def readiness_of(fleet: FleetView, outlook: Outlook, *, draining: bool) -> Readiness:
    """The fleet as /ready shows it."""
    snapshot = fleet.snapshot()
    seen = {replica.name: outlook.ejection(replica.name) for replica in snapshot.replicas}
    in_place = {replica.name for replica in snapshot.ready()}
    ready = {name for name in in_place if seen[name].standing not in (OutlierState.EJECTED, OutlierState.SUSPECT)}
    if draining:
        reason = "the gateway is stopping"
    elif not snapshot.replicas:
        reason = NO_REPLICAS
    elif in_place and not ready:
        reason = "every replica that is up is suspect, or ejected for its failures"
    else:
        reason = "" if ready else "no replica is ready"
    return Readiness(
        ready=bool(ready) and not draining,
        reason=reason,
        model=snapshot.served_model_name,
        warnings=outlook.warnings(),
        replicas=[
            ReplicaReadiness(
                name=replica.name,
                ready=replica.name in ready,
                state=str(replica.state),
                standing=seen[replica.name].standing,
                reason=replica.reason or seen[replica.name].why,
                restarts=replica.restarts,
                device=replica.device,
            )
            for replica in snapshot.replicas
        ],
    )
