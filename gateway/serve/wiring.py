"""Assembles the parts of the front door: those of each fleet (fleet_parts.py), and what all share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from gateway import __version__
from gateway.admin.app import build_app
from gateway.admin.audit import Audited
from gateway.admin.audit_chain import AuditLog
from gateway.admin.kv_routes import FlushTiers
from gateway.file_watch import FileWatch
from gateway.http_server.request_cycle import Asgi
from gateway.kept_prefixes.keepers import Keepers
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices
from gateway.limits.shapes import QueueStats
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.limits.state_file import StateFile
from gateway.planner.plan import Plan
from gateway.relay.frontdoor import FrontDoor
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.relay.relay import Relay
from gateway.relay.served_fleets import ServedFleets
from gateway.replica_control.controls import ReplicaControls
from gateway.serve.fleet_parts import FleetParts, GivenFleet, fleet_parts
from gateway.settings import Settings
from gateway.settings_limits import limits_address
from gateway.stats.all_figures import AllFigures
from gateway.stats.node_stats import node_stats
from gateway.stats.process_figures import ProcessFigures
from gateway.stats.prometheus import Metrics
from gateway.stats.replica_metrics import ReplicaMetrics
from gateway.stats.request_log import RequestLog
from gateway.stats.traces import Traces
from gateway.stats.view import FleetFigures
from gateway.tenants.access import AdminAccess
from gateway.tenants.key_file import read_keys
from gateway.tenants.key_watch import watch_keys
from gateway.tenants.salts import kept_salt_secret, read_salt_secret
from gateway.tenants.tenants import Tenants
from gateway.ui.routes import add_page
from gateway.upstream.pool import Upstream

_logger = logging.getLogger(__name__)

SALT_SECRET = "salt-secret"
"""The file beside that of the limits with a secret of our own, where tenants need one and nobody gave one."""


class Logs(NamedTuple):
    """Where requests and acts are written down, if that is wanted."""

    requests: RequestLog | None = None
    audit: AuditLog | None = None
    traces: Traces | None = None


@dataclass(frozen=True, slots=True)
class Door:
    """The parts that the process keeps a reference to."""

    app: FrontDoor
    relay: Relay[Plan]
    fleets: tuple[FleetParts, ...]
    upstream: Upstream
    figures: AllFigures
    large_bodies: LargeBodies
    keys: FileWatch | None
    limiter: Limiter
    tenants: Tenants
    access: AdminAccess

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on, as far as serve/reloading.py says that they take effect.

        Raises SettingsError before any of them does.
        """
        self.tenants.configure(settings.tenants, settings.admin_key)
        self.relay.use(settings)
        self.upstream.use(settings)
        self.access.use(settings.admin_key)
        self.limiter.prices = Prices(settings.cached_token_price, settings.generated_token_price)
        for fleet in self.fleets:
            fleet.use(settings)

    async def close(self) -> None:
        """Measure the last requests, close connections and tables."""
        self.relay.records.flush()
        await self.large_bodies.close()
        for fleet in self.fleets:
            await fleet.close()
        await self.upstream.close()
        await self.limiter.close()


def build_door(settings: Settings, given: Sequence[GivenFleet], logs: Logs | None = None) -> Door:
    """Build the front door for the fleets `given`. Raises KeyFileError and SettingsError."""
    upstream, access, (tenants, keys, limiter) = Upstream(settings), AdminAccess(settings.admin_key), _accounts(settings)
    parts = tuple(fleet_parts(each, upstream, tenants) for each in given)
    fleets = ServedFleets([each.served for each in parts])
    bodies = _large_bodies(settings, parts, fleets, tenants)
    relay = Relay(
        settings, fleets=fleets, upstream=upstream, tenants=tenants, access=access, limiter=limiter, large_bodies=bodies
    )
    figures = _figures(settings, parts, fleets, relay, limiter, upstream)
    logs = Logs() if logs is None else logs
    relay.records.meters = (figures.measured, *(log for log in (logs.requests, logs.traces) if log is not None))
    if logs.requests is not None:
        figures.measured.registry.register(logs.requests)
    admin = build_app(
        fleets=[each.fleet for each in parts],
        upstream=upstream,
        figures=figures,
        access=access,
        keeper=Keepers([each.keeper for each in parts], fleets.find_place),
        replicas=ReplicaControls([each.replicas for each in parts]),
        body_bytes_max=settings.body_bytes_max,
        flush_tiers=_flush_tiers(parts, settings.run_dir),
        draining=lambda: relay.draining,
    )
    add_page(admin, access)
    audited = admin if logs.audit is None else _audited(admin, logs.audit, access)
    app = FrontDoor(relay=relay, fleets=fleets, tenants=tenants, limiter=limiter, admin=audited)
    return Door(app, relay, parts, upstream, figures, bodies, keys, limiter, tenants, access)


def _figures(
    settings: Settings,
    parts: Sequence[FleetParts],
    fleets: ServedFleets[Plan],
    relay: Relay[Plan],
    limiter: Limiter,
    upstream: Upstream,
) -> AllFigures:
    shown = [
        FleetFigures(
            fleet=each.fleet,
            planner=each.planner,
            tokens=each.tokens,
            recorder=each.recorder,
            keeper=each.keeper,
            queue=QueueStats if each.served.admission is None else each.served.admission.shown,
        )
        for each in parts
    ]
    process = ProcessFigures(
        lambda: (relay.counters, relay.in_flight),
        limit_uses=limiter.uses,
        shared_limits=limiter.shared,
        nodes=lambda: node_stats(settings.run_dir),
    )
    measured = Metrics()
    for each in parts:
        each.recorder.feed.add(measured.imports.delivered)
    return AllFigures(
        shown,
        fleets.place,
        process,
        measured=measured,
        measure=relay.records.flush,
        replica_metrics=ReplicaMetrics([each.fleet for each in parts], upstream) if settings.replica_metrics else None,
    )


def _large_bodies(settings: Settings, parts: Sequence[FleetParts], fleets: ServedFleets[Plan], tenants: Tenants) -> LargeBodies:
    return LargeBodies(
        [(each.source, each.planner.prompts) for each in parts],
        workers=settings.large_body_workers,
        cache_bytes_max=settings.token_cache_bytes_max,
        texts_bytes_max=settings.text_cache_bytes_max,
        tenants=lambda: len(tenants),
        names=fleets.names if len(parts) > 1 else None,
    )


def _flush_tiers(parts: Sequence[FleetParts], run_dir: Path) -> FlushTiers:
    """What empties disk and vault of all fleets, whose replicas' caches are empty then, and tells their planners of that; where
    there are several, it says whose.

    Nodes that are not heard were not reached, and will hold what they held when they are heard again.
    """

    async def flush() -> dict[str, str]:
        for each in parts:
            each.planner.flushed()
        found = await asyncio.gather(*(each.tiers.flush() for each in parts))
        silent = {
            node.name: f"it is not heard ({node.trouble}): flush it there" for node in node_stats(run_dir) if node.trouble
        }
        if len(parts) == 1:
            return found[0] | silent
        models = [each.fleet.snapshot().served_model_name for each in parts]
        stores = {f"{name} of {model}": why for model, each in zip(models, found, strict=True) for name, why in each.items()}
        return stores | silent

    return flush


def _audited(admin: Asgi, log: AuditLog, access: AdminAccess) -> Audited:
    """The admin application with its acts written down. Raises OSError."""
    audited = Audited(admin, log, access)
    audited.write({"act": "start", "version": __version__})
    return audited


def _accounts(settings: Settings) -> tuple[Tenants, FileWatch | None, Limiter]:
    """Who may call, and how much. Raises KeyFileError, SettingsError."""
    file = settings.keys_file
    keys = None if file is None else read_keys(file)
    secret = settings.salt_secret_file
    tenants = Tenants(
        settings.tenants,
        settings.admin_key,
        keys,
        allow_anyone=settings.allow_anyone,
        salt_secret=None if secret is None else read_salt_secret(secret),
        make_secret=partial(_own_salt_secret, settings),
    )
    limiter = Limiter(
        Prices(settings.cached_token_price, settings.generated_token_price),
        reservation_seconds=settings.reservation_seconds_max,
        keys=lambda: tenants.keys,
        file=None if file is None else StateFile(settings.limits_file),
        shared=_shared_limits(settings),
    )
    return tenants, None if file is None else watch_keys(file, tenants), limiter


def _shared_limits(settings: Settings) -> SharedLimits | None:
    """What counts for several gateways, if there is such a server. Raises SettingsError."""
    address = limits_address(settings)
    if address is not None and settings.keys_file is None:
        _logger.warning("limits_valkey is not used: there are limits for the keys of a keys_file alone")
        return None
    return None if address is None else SharedLimits(address, wait_seconds_max=settings.limits_valkey_wait_seconds_max)


def _own_salt_secret(settings: Settings) -> bytes:
    """A secret that is ours alone, for tenants of the settings. Raises SettingsError."""
    if settings.node_name or settings.vault:
        _logger.warning(
            "other nodes' gateways do not find blocks of this one's tenants, unless all have the same secret for their salts: "
            "give each the same salt_secret_file"
        )
    return kept_salt_secret(settings.limits_file.with_name(SALT_SECRET))
