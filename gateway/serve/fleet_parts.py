"""What the front door has for each fleet: who reads its prompts, plans, records, keeps prefixes and drains its replicas."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.fleet import FleetControl, FleetSnapshot
from engine.frame_tiers.client import TierClient
from engine.frame_tiers.messages import SOCKET
from engine.frame_tiers.store import StoreName
from engine.replicas.vllm_options import option_name, schedules_by_priority
from gateway.block_registry.fleet_watch import HOLD_SECONDS
from gateway.kept_prefixes.book import KeptPrefixBook
from gateway.kept_prefixes.keeper import Keeper
from gateway.kept_prefixes.lossy_callers import LossyCallers
from gateway.kept_prefixes.prefix_reader import PrefixReader
from gateway.kept_prefixes.prewarm import Prewarmer
from gateway.ledger.ledger import Ledger
from gateway.ledger.recorder import Recorder
from gateway.planner.index_keeper import IndexKeeper
from gateway.planner.overdue_watch import OverdueWatch
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity_watch import ParityWatch
from gateway.prompts.tokenizer.answer_defaults import answer_tokens_default, parses_chats
from gateway.prompts.tokenizer.engine_options import source_from_arguments
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.relay.admission import Admission
from gateway.relay.going_on import GoingOn
from gateway.relay.served_fleets import ServedFleet
from gateway.replica_control.control import ReplicaControl
from gateway.replica_control.hand_over import HandOver
from gateway.settings import Settings
from gateway.steering.outliers import Outliers
from gateway.tenants.tenants import Tenants
from gateway.upstream.pool import Upstream
from gateway.upstream.served_models import ModelsCache
from transport.table.directory import TableDirectory

_INEXACT = ("--ge", "--ov", "--logi")
"""How vLLM's options begin, abbreviated as far as it takes them, that may bound answers anew (--generation-config,
--override-generation-config) or look back at the output (--logits-processors)."""


@dataclass(frozen=True, slots=True)
class GivenFleet:
    """A fleet to open a front door for, with settings of its own, as it was `found`.

    `pin_share_max` is that of its replicas; None: not known, as somebody else started them.
    """

    settings: Settings
    control: FleetControl
    found: FleetSnapshot
    pin_share_max: float | None


@dataclass(frozen=True, slots=True)
class FleetParts:
    """The parts for one fleet."""

    fleet: FleetControl
    served: ServedFleet[Plan]
    tables: TableDirectory
    source: TokenizerSource
    tokens: TokenService
    tiers: TierClient
    planner: Planner
    recorder: Recorder
    keeper: Keeper
    replicas: ReplicaControl
    parity: ParityWatch
    overdue: OverdueWatch

    def work(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """What has to go on as long as the door is open, each with what it is."""
        yield "the comparison of token ids with an engine's", self.parity.run()
        yield "the watch over overdue requests", self.overdue.run()
        yield "the filling of the index of blocks", IndexKeeper(self.planner.fleet, self.planner.registry).run()
        yield "the connection to disk and vault", self.tiers.run()
        yield "the renewal of kept prefixes", self.keeper.run()

    def use(self, settings: Settings) -> None:
        """Go by these settings from now on, as far as serve/reloading.py says that they take effect."""
        self.planner.slow_start.seconds = settings.slow_start_seconds
        self.replicas.drain_seconds = settings.drain_seconds

    async def close(self) -> None:
        """End what is under way, close the tables."""
        await self.replicas.close()
        await self.served.models.close()
        self.tables.close()


def fleet_parts(given: GivenFleet, upstream: Upstream, tenants: Tenants) -> FleetParts:
    """Build the parts for a fleet."""
    settings, fleet, vllm_args = given.settings, given.control, given.found.vllm_args
    models = ModelsCache(fleet, upstream)
    tables = TableDirectory(Path(given.found.table_dir), hold_seconds=HOLD_SECONDS)
    source = source_from_arguments(given.found.model, vllm_args)
    tokens = TokenService(source, settings.token_cache_bytes_max, settings.text_cache_bytes_max, tenants=lambda: len(tenants))
    outliers = Outliers(settings.eject_failures_max, settings.eject_seconds_min, settings.eject_seconds_max)
    stores: tuple[tuple[StoreName, object], ...] = (("disk", settings.disk), ("vault", settings.vault))
    tiers = TierClient(settings.run_dir / SOCKET, [name for name, where in stores if where])
    planner = Planner(fleet, tables, tokens, settings, lambda: models.known, outliers=outliers, tiers=tiers)
    recorder = Recorder(Ledger(settings.ledger_requests_max), planner)
    waits = settings.replica_requests_max > 0
    served = ServedFleet(
        fleet=fleet,
        models=models,
        planner=planner,
        recorder=recorder,
        going_on=_going_on(settings, planner, tokens, source, vllm_args),
        admission=Admission(settings, lambda: len(fleet.snapshot().ready())) if waits else None,
        ranked=schedules_by_priority(vllm_args),
        names=frozenset((given.found.served_model_name, *settings.model_aliases)),
    )
    callers = LossyCallers(tenants) if settings.lossy else tenants
    keeper = Keeper(
        KeptPrefixBook(settings.prefixes_kept_max, settings.prefixes_kept_tokens_max),
        fleet=fleet,
        planner=planner,
        upstream=upstream,
        reader=PrefixReader(planner, tokens, callers, models),
        tenants=callers,
        recorder=recorder,
        seconds_max=settings.prefix_seconds_max,
        pin_share_max=given.pin_share_max,
    )
    return FleetParts(
        fleet=fleet,
        served=served,
        tables=tables,
        source=source,
        tokens=tokens,
        tiers=tiers,
        planner=planner,
        recorder=recorder,
        keeper=keeper,
        replicas=_replica_control(settings, fleet, planner, Prewarmer(fleet, upstream, recorder, settings.prefix_seconds_max)),
        parity=ParityWatch(fleet, planner.prompts, tokens, interval_seconds=settings.parity_interval_seconds),
        overdue=OverdueWatch(planner, fleet, upstream.give_up, seconds_min=settings.overdue_seconds_min),
    )


def _replica_control(settings: Settings, fleet: FleetControl, planner: Planner, prewarmer: Prewarmer) -> ReplicaControl:
    return ReplicaControl(
        fleet,
        HandOver(planner, prewarmer),
        planner.in_flight,
        drain_seconds=settings.drain_seconds,
        startup_seconds_max=settings.startup_seconds_max,
    )


def _going_on(
    settings: Settings, planner: Planner, tokens: TokenService, source: TokenizerSource, vllm_args: Sequence[str]
) -> GoingOn[Plan] | None:
    """What goes on with broken streams; None where that is not wanted, or would not be exact with the engines' options."""
    options = {option_name(word) for word in vllm_args}  # may be abbreviated
    if not settings.continue_streams or any(option.startswith(_INEXACT) for option in options):
        return None
    parses = any(option.startswith(("--rea", "--tool")) for option in options)
    return GoingOn(
        planner,
        is_whole=tokens.ends_whole,
        parses=parses or parses_chats(source),
        tokens_default=lambda: answer_tokens_default(source),
    )
