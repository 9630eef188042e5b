"""The OpenAPI document without a running gateway: of an application over an empty fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.fleet import FileFleet
from gateway.access import AdminAccess
from gateway.app import build_app
from gateway.explain import Explanation
from gateway.openapi import describe
from gateway.pins import KeptPrefix
from gateway.prefix_shapes import PrefixRemoved, PrefixRequest
from gateway.prefixes import PrefixReport
from gateway.settings import Settings
from gateway.stats import KvStats
from gateway.upstream import Upstream

_NOWHERE = Path("/nonexistent")


class NothingToSee:
    """Stands where the running gateway's sight is; a document needs its types alone."""

    def stats(self) -> KvStats:
        raise NotImplementedError

    def prefixes(self, limit: int) -> PrefixReport:
        raise NotImplementedError

    def explain(self, request_id: str) -> Explanation | None:
        raise NotImplementedError

    def metrics(self) -> tuple[bytes, str]:
        raise NotImplementedError


class NothingKept:
    """Stands where the running gateway's keeper is."""

    async def keep(self, wanted: PrefixRequest) -> KeptPrefix:
        raise NotImplementedError

    async def undo(self, prefix_id: str) -> PrefixRemoved:
        raise NotImplementedError


def document() -> dict[str, Any]:
    """The document that every gateway of this version serves."""
    settings = Settings.model_construct()
    app = build_app(
        fleet=FileFleet(_NOWHERE),
        upstream=Upstream(settings),
        sight=NothingToSee(),
        access=AdminAccess(None),
        keeper=NothingKept(),
        body_bytes_max=0,
        draining=lambda: False,
    )
    return describe(app)
