"""Puts the parts of the front door together."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from engine.fleet import FleetView
from gateway.access import AdminAccess
from gateway.app import build_app
from gateway.frontdoor import FrontDoor
from gateway.keeper import Keeper
from gateway.ledger import Ledger
from gateway.model_files import source_from_arguments
from gateway.pins import PinBook
from gateway.plan import Plan
from gateway.plan_witness import PlanWitness
from gateway.planner import Planner
from gateway.prefix_reader import PrefixReader
from gateway.recent import RecentTables
from gateway.recorder import Recorder
from gateway.relay import Relay
from gateway.seen import SeenPrefixes
from gateway.served_models import ModelsCache
from gateway.settings import Settings
from gateway.sight import FleetSight
from gateway.tenants import Tenants
from gateway.tokens import TokenService
from gateway.upstream import Upstream
from transport.directory import TableDirectory


@dataclass(frozen=True, slots=True)
class Door:
    """The parts that the process holds on to."""

    app: FrontDoor
    relay: Relay[Plan]
    models: ModelsCache
    upstream: Upstream
    planner: Planner
    tokens: TokenService
    tables: TableDirectory
    keeper: Keeper

    async def close(self) -> None:
        """Close connections and tables."""
        await self.models.close()
        await self.upstream.close()
        self.tables.close()


def build_door(settings: Settings, fleet: FleetView, *, model: str, table_dir: Path) -> Door:
    """The front door for `fleet`, which serves `model`."""
    upstream = Upstream(settings)
    models = ModelsCache(fleet, upstream)
    tables = TableDirectory(table_dir)
    tokens = TokenService(
        source_from_arguments(model, settings.vllm_args), settings.token_cache_bytes_max, settings.text_cache_bytes_max
    )
    planner = Planner(fleet, RecentTables(tables), tokens, settings, lambda: models.known)
    access = AdminAccess(settings.admin_key)
    tenants = Tenants(settings.tenants, settings.admin_key)
    relay: Relay[Plan] = Relay(
        settings,
        fleet=fleet,
        upstream=upstream,
        models=models,
        planner=planner,
        tenants=tenants,
        access=access,
    )
    recorder = Recorder(
        Ledger(settings.ledger_requests_max),
        SeenPrefixes(settings.ledger_prefixes_max),
        planner.feed,
        planner.registry,
        tenants.salt_of,
        prompts_bytes_max=settings.ledger_prompts_bytes_max,
        later=lambda work: asyncio.get_running_loop().call_soon(work),
    )
    witness = relay.witness = PlanWitness(recorder, planner)
    keeper = Keeper(
        PinBook(settings.prefixes_kept_max, settings.prefixes_kept_tokens_max),
        fleet=fleet,
        planner=planner,
        upstream=upstream,
        reader=PrefixReader(planner, tokens, tenants, models),
        tenants=tenants,
        witness=witness,
        seconds_max=settings.prefix_seconds_max,
    )
    sight = FleetSight(fleet=fleet, planner=planner, tokens=tokens, relay=relay, recorder=recorder, keeper=keeper)
    relay.meter = sight.measured
    admin = build_app(
        fleet=fleet,
        upstream=upstream,
        sight=sight,
        access=access,
        keeper=keeper,
        body_bytes_max=settings.body_bytes_max,
        draining=lambda: relay.draining,
    )
    app = FrontDoor(relay=relay, models=models, tenants=tenants, admin=admin)
    return Door(app, relay, models, upstream, planner, tokens, tables, keeper)
