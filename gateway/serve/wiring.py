"""Assembles the parts of the front door."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.fleet import FleetView
from gateway.admin.app import build_app
from gateway.block_registry.fleet_watch import HOLD_SECONDS
from gateway.kept_prefixes.book import KeptPrefixBook
from gateway.kept_prefixes.keeper import Keeper
from gateway.kept_prefixes.prefix_reader import PrefixReader
from gateway.ledger.ledger import Ledger
from gateway.ledger.recorder import Recorder
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices
from gateway.limits.shapes import QueueStats
from gateway.limits.state_file import StateFile
from gateway.planner.overdue_watch import OverdueWatch
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.relay.frontdoor import FrontDoor
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.relay.relay import Relay
from gateway.settings import Settings
from gateway.stats.replica_metrics import ReplicaMetrics
from gateway.stats.request_log import RequestLog
from gateway.stats.view import FleetFigures
from gateway.steering.outliers import Outliers
from gateway.tenants.access import AdminAccess
from gateway.tenants.key_file import read_keys
from gateway.tenants.key_watch import KeyWatch
from gateway.tenants.tenants import Tenants
from gateway.ui.routes import add_page
from gateway.upstream.pool import Upstream
from gateway.upstream.served_models import ModelsCache
from transport.table.directory import TableDirectory


@dataclass(frozen=True, slots=True)
class Door:
    """The parts that the process keeps a reference to."""

    app: FrontDoor
    relay: Relay[Plan]
    models: ModelsCache
    upstream: Upstream
    planner: Planner
    tokens: TokenService
    tables: TableDirectory
    keeper: Keeper
    overdue: OverdueWatch
    figures: FleetFigures
    large_bodies: LargeBodies
    keys: KeyWatch | None
    limiter: Limiter

    async def close(self) -> None:
        """Measure the last requests, close connections and tables."""
        self.relay.records.flush()
        await self.large_bodies.close()
        await self.models.close()
        await self.upstream.close()
        self.tables.close()
        self.limiter.close()


def build_door(
    settings: Settings,
    fleet: FleetView,
    *,
    model: str,
    vllm_args: tuple[str, ...],
    table_dir: Path,
    pin_share_max: float | None,
    request_log: RequestLog | None = None,
) -> Door:
    """Build the front door for `fleet`, which serves `model` with `vllm_args`. Raises KeyFileError.

    `pin_share_max` is that of its replicas; None: not known, as somebody else started them.
    """
    upstream = Upstream(settings)
    models = ModelsCache(fleet, upstream)
    tables = TableDirectory(table_dir, hold_seconds=HOLD_SECONDS)
    tenants, keys, limiter = _accounts(settings)
    source = source_from_arguments(model, vllm_args)
    tokens = TokenService(source, settings.token_cache_bytes_max, settings.text_cache_bytes_max, tenants=len(tenants))
    outliers = Outliers(settings.eject_failures_max, settings.eject_seconds_min, settings.eject_seconds_max)
    planner = Planner(fleet, tables, tokens, settings, lambda: models.known, outliers=outliers)
    access = AdminAccess(settings.admin_key)
    recorder = Recorder(Ledger(settings.ledger_requests_max), planner)
    large_bodies = _large_bodies(settings, source, planner, len(tenants))
    relay: Relay[Plan] = Relay(
        settings,
        fleet=fleet,
        upstream=upstream,
        models=models,
        planner=planner,
        recorder=recorder,
        tenants=tenants,
        access=access,
        limiter=limiter,
        large_bodies=large_bodies,
    )
    keeper = Keeper(
        KeptPrefixBook(settings.prefixes_kept_max, settings.prefixes_kept_tokens_max),
        fleet=fleet,
        planner=planner,
        upstream=upstream,
        reader=PrefixReader(planner, tokens, tenants, models),
        tenants=tenants,
        recorder=recorder,
        seconds_max=settings.prefix_seconds_max,
        pin_share_max=pin_share_max,
    )
    figures = FleetFigures(
        fleet=fleet,
        planner=planner,
        tokens=tokens,
        relay_counts=lambda: (relay.counters, relay.in_flight),
        recorder=recorder,
        keeper=keeper,
        limit_uses=limiter.uses,
        queue=QueueStats if relay.admission is None else relay.admission.shown,
        measure=relay.records.flush,
        replica_metrics=ReplicaMetrics(fleet, upstream) if settings.replica_metrics else None,
    )
    _measure(relay, figures, request_log)
    admin = build_app(
        fleet=fleet,
        upstream=upstream,
        figures=figures,
        access=access,
        keeper=keeper,
        body_bytes_max=settings.body_bytes_max,
        draining=lambda: relay.draining,
    )
    add_page(admin, access)
    app = FrontDoor(relay=relay, models=models, tenants=tenants, limiter=limiter, admin=admin)
    overdue = OverdueWatch(planner, fleet, upstream.give_up, seconds_min=settings.overdue_seconds_min)
    return Door(app, relay, models, upstream, planner, tokens, tables, keeper, overdue, figures, large_bodies, keys, limiter)


def _measure(relay: Relay[Plan], figures: FleetFigures, request_log: RequestLog | None) -> None:
    """Have what is recorded of each request counted, and logged if that is wanted."""
    relay.records.meters = (figures.measured,)
    if request_log is not None:
        relay.records.meters += (request_log,)
        figures.measured.registry.register(request_log)


def _accounts(settings: Settings) -> tuple[Tenants, KeyWatch | None, Limiter]:
    """Who may call, and how much. Raises KeyFileError."""
    file = settings.keys_file
    tenants = Tenants(settings.tenants, settings.admin_key, None if file is None else read_keys(file))
    limiter = Limiter(
        Prices(settings.cached_token_price, settings.generated_token_price),
        reservation_seconds=settings.reservation_seconds_max,
        keys=lambda: tenants.keys,
        file=None if file is None else StateFile(settings.limits_file),
    )
    return tenants, None if file is None else KeyWatch(file, tenants), limiter


def _large_bodies(settings: Settings, source: TokenizerSource, planner: Planner, tenants: int) -> LargeBodies:
    return LargeBodies(
        source,
        planner.prompts,
        workers=settings.large_body_workers,
        cache_bytes_max=settings.token_cache_bytes_max,
        texts_bytes_max=settings.text_cache_bytes_max,
        tenants=tenants,
    )
