"""`/health` and `/ready`: open to everybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Protocol

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel, Field

from engine.fleet import FleetView
from gateway.api.shapes import ErrorAnswer
from gateway.errors import UnknownModel
from gateway.limits.refusals import NoSuchModel
from gateway.steering.outliers import Ejection, OutlierState

READY_RETRY_SECONDS = 5
_MODEL_CHARS_MAX = 512
NO_REPLICAS = "there are no replicas: `peerkv engine` starts them"  # beside `peerkv serve` there always are


class Outlook(Protocol):
    """What the gateway itself thinks of its replicas."""

    def place(self, model: str) -> int:
        """Which of the fleets has a model, by any name that clients may use. Raises UnknownModel."""
        ...

    def ejection(self, replica: str) -> Ejection:
        """Whether a replica gets requests, and why not."""
        ...

    def warnings(self) -> list[str]:
        """What keeps replicas that are ready from exchanging KV, and disk or vault from being used, and what to do."""
        ...


class Health(BaseModel):
    """The gateway lives."""

    status: str = "ok"


class ReplicaReadiness(BaseModel):
    """One replica: `reason` says why it is not ready."""

    name: str
    model: str = Field("", description="the model that it serves")
    ready: bool = Field(description="it is in the state ready, and gets requests")
    state: str = Field(description="starting, ready, draining, backoff, failed or stopped")
    standing: OutlierState = Field(
        description="well; ejected, since its answers failed; half-open, tried with one request at a time; or suspect"
    )
    reason: str
    restarts: int
    device: str


class ModelReadiness(BaseModel):
    """Whether requests for one model can be served now."""

    model: str
    ready: bool
    reason: str = Field(description="why not, empty when ready")


class Readiness(BaseModel):
    """Whether requests can be served now: those for one model at least, where there are several."""

    ready: bool
    reason: str = Field(description="why not, empty when ready")
    model: str = Field(description="the model, or all of them, separated by commas")
    models: list[ModelReadiness] = Field([], description="each model that has replicas of its own here")
    warnings: list[str] = Field(
        description="what keeps replicas that are ready from exchanging KV, and disk or vault from being used, and what to do"
    )
    replicas: list[ReplicaReadiness]


OfModel = Annotated[str, Query(description="the name of one model, where several are served", max_length=_MODEL_CHARS_MAX)]


def add_open_routes(app: FastAPI, fleets: Sequence[FleetView], outlook: Outlook, draining: Callable[[], bool]) -> None:
    """Add the routes to the application."""

    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["admin"], summary="The gateway lives")
    async def health() -> Health:
        return Health()

    @app.head("/ready", include_in_schema=False)
    @app.get(
        "/ready",
        tags=["admin"],
        summary="At least one replica serves",
        responses={
            400: {"model": ErrorAnswer, "description": "The model's name is too long"},
            404: {"model": ErrorAnswer, "description": "There is no such model"},
            503: {"model": Readiness, "description": "No replica serves, or the gateway stops"},
        },
    )
    async def ready(response: Response, model: OfModel = "") -> Readiness:
        wanted = [fleets[_place(outlook, model)]] if model else fleets
        readiness = readiness_of_all(wanted, outlook, draining=draining())
        if not readiness.ready:
            response.status_code = 503
            response.headers["retry-after"] = str(READY_RETRY_SECONDS)
        return readiness


def _place(outlook: Outlook, model: str) -> int:
    """Raises NoSuchModel, which lists no models: anybody may ask here, and adapters are told to callers with keys alone."""
    try:
        return outlook.place(model)
    except UnknownModel:
        raise NoSuchModel(model) from None


def readiness_of_all(fleets: Sequence[FleetView], outlook: Outlook, *, draining: bool) -> Readiness:
    """The fleets as /ready shows them: ready if one of them is."""
    found = [readiness_of(fleet, outlook, draining=draining) for fleet in fleets]
    models = [model for model, _ in found]
    ready = any(model.ready for model in models)
    why = models[0].reason if len(models) == 1 or draining else "; ".join(f"{each.model}: {each.reason}" for each in models)
    return Readiness(
        ready=ready,
        reason="" if ready else why,
        model=", ".join(each.model for each in models),
        models=models,
        warnings=outlook.warnings(),
        replicas=[replica for _, replicas in found for replica in replicas],
    )


def readiness_of(fleet: FleetView, outlook: Outlook, *, draining: bool) -> tuple[ModelReadiness, list[ReplicaReadiness]]:
    """A fleet's part of what /ready shows."""
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
    model = snapshot.served_model_name
    return ModelReadiness(model=model, ready=bool(ready) and not draining, reason=reason), [
        ReplicaReadiness(
            name=replica.name,
            model=model,
            ready=replica.name in ready,
            state=str(replica.state),
            standing=seen[replica.name].standing,
            reason=replica.reason or seen[replica.name].why,
            restarts=replica.restarts,
            device=replica.device,
        )
        for replica in snapshot.replicas
    ]
