"""`/replicas`: drain, resume and restart them, under the admin rule."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Path, Query

from gateway.api.shapes import ErrorAnswer
from gateway.replica_control.shapes import ControlledReplica, ReplicaList

_NAME_CHARS_MAX = 128
_Name = Annotated[str, Path(max_length=_NAME_CHARS_MAX)]
_Force = Annotated[bool, Query(description="also if no other replica is ready, so that nobody serves meanwhile")]


class ReplicaKeeper(Protocol):
    """What can be done with replicas. Methods raise ApiError."""

    def all(self) -> ReplicaList:
        """Every replica now."""
        ...

    async def drain(self, name: str, *, force: bool = False) -> ControlledReplica:
        """Send it nothing new, and hand over what it holds."""
        ...

    async def resume(self, name: str) -> ControlledReplica:
        """Send it requests again."""
        ...

    async def restart(self, name: str, *, force: bool = False) -> ControlledReplica:
        """Drain it, hand over, restart it."""
        ...


def add_replica_routes(router: APIRouter, replicas: ReplicaKeeper) -> None:
    """Add the routes to the admin router."""
    errors: dict[int | str, dict[str, Any]] = {
        400: {"model": ErrorAnswer, "description": "There is no such replica"},
        409: {
            "model": ErrorAnswer,
            "description": "Not now: it is busy, the only ready one, or run by another process or node",
        },
    }

    @router.get("/replicas", summary="All replicas, and what is being done with them")
    async def show() -> ReplicaList:
        return replicas.all()

    @router.post(
        "/replicas/{name}/drain",
        summary="Send it no new requests, and put its most requested prefixes into the caches of others",
        responses=errors,
    )
    async def drain(name: _Name, force: _Force = False) -> ControlledReplica:
        return await replicas.drain(name, force=force)

    @router.post("/replicas/{name}/resume", summary="Send it requests again", responses=errors)
    async def resume(name: _Name) -> ControlledReplica:
        return await replicas.resume(name)

    @router.post(
        "/replicas/{name}/restart",
        status_code=202,
        summary="Drain it, hand over its prefixes, wait for its requests and restart it; GET /replicas tells how far that is",
        responses=errors,
    )
    async def restart(name: _Name, force: _Force = False) -> ControlledReplica:
        return await replicas.restart(name, force=force)
