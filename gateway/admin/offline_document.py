"""The OpenAPI document without a running gateway: of an application over an empty fleet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engine.fleet import FileFleet
from gateway.admin.app import build_app
from gateway.admin.openapi import describe
from gateway.kept_prefixes.book import KeptPrefixAnswer
from gateway.kept_prefixes.shapes import FlushedPrefixes, PrefixRemoved, PrefixReport, PrefixRequest
from gateway.replica_control.shapes import ControlledReplica, ReplicaList
from gateway.settings import Settings
from gateway.stats.explain import Explanation
from gateway.stats.shapes import KvStats
from gateway.steering.outliers import Ejection
from gateway.tenants.access import AdminAccess
from gateway.upstream.pool import Upstream

_NOWHERE = Path("/nonexistent")


class NothingToSee:
    """Stands where the running gateway's figures is; a document needs its types alone."""

    def stats(self, model: str = "") -> KvStats:
        raise NotImplementedError

    def prefixes(self, limit: int, model: str = "") -> PrefixReport:
        raise NotImplementedError

    def explain(self, request_id: str) -> Explanation | None:
        raise NotImplementedError

    async def metrics(self) -> tuple[bytes, str]:
        raise NotImplementedError

    def place(self, model: str) -> int:
        raise NotImplementedError

    def ejection(self, replica: str) -> Ejection:
        raise NotImplementedError

    def warnings(self) -> list[str]:
        raise NotImplementedError


class NothingKept:
    """Stands where the running gateway's keeper is."""

    async def keep(self, wanted: PrefixRequest) -> KeptPrefixAnswer:
        raise NotImplementedError

    async def undo(self, prefix_id: str) -> PrefixRemoved:
        raise NotImplementedError

    def flushed(self, emptied: Iterable[str], tried: Iterable[str]) -> FlushedPrefixes:
        return FlushedPrefixes()


class NobodyControlled:
    """Stands where the running gateway's control of its replicas is."""

    def all(self) -> ReplicaList:
        raise NotImplementedError

    async def drain(self, name: str, *, force: bool = False) -> ControlledReplica:
        raise NotImplementedError

    async def resume(self, name: str) -> ControlledReplica:
        raise NotImplementedError

    async def restart(self, name: str, *, force: bool = False) -> ControlledReplica:
        raise NotImplementedError


def document() -> dict[str, Any]:
    """The document that every gateway of this version serves."""
    settings = Settings.model_construct()
    app = build_app(
        fleets=[FileFleet(_NOWHERE)],
        upstream=Upstream(settings),
        figures=NothingToSee(),
        access=AdminAccess(None),
        keeper=NothingKept(),
        replicas=NobodyControlled(),
        body_bytes_max=0,
        draining=lambda: False,
    )
    return describe(app)
