"""A planner for a fleet of two, over real tables and a tiny tokenizer."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.tenants.tenants import ANONYMOUS, TenantContext
from gateway.upstream.served_models import ServedModels
from tests.unit.transport.replica_tables import ReplicaTables, StandingFleet
from transport.table.directory import TableDirectory

EXACT = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.EXACT))
IDS = list(range(2, 2 + 21))
LONG = list(range(1000, 1000 + 601))
TENANT = TenantContext("t", "salty")


@dataclass(frozen=True)
class Bounds:
    prefixes_tracked_max: int = 1000
    imports: bool = True
    tokenize_inline_chars_max: int = 100
    key_cache_bytes_max: int = 1 << 20
    send_chat_ids: bool = True
    slow_start_seconds: float = 10.0
    tier_wait_seconds_max: float = 1.0


class Place:
    """A fleet of two with its tables and a planner."""

    def __init__(self, tables: ReplicaTables, model: Path) -> None:
        self.tables = tables
        self.fleet = StandingFleet("a", "b", directory=tables.directory)
        self.tokens = TokenService(TokenizerSource(str(model)))
        self.tokens.load()
        self.models: ServedModels | None = None
        self.planner = Planner(self.fleet, TableDirectory(tables.directory), self.tokens, Bounds(), lambda: self.models)
        self.planner.prompts.parity = EXACT

    async def plan(self, prompt: Any = None, wanted: str | None = None, tenant: TenantContext = ANONYMOUS, **body: Any) -> Plan:
        return await self.planner.plan("completions", {"prompt": prompt, **body}, tenant, wanted_replica=wanted)

    def begin(self, plan: Plan) -> None:
        """The request is sent."""
        self.planner.flights.started(plan.flight, time.monotonic())

    def end(self, plan: Plan) -> None:
        """Its answer is complete."""
        self.planner.feed.poll(plan.replica.name)
        self.planner.flights.finished(plan.flight, time.monotonic())

    async def occupy(self, replica: str) -> None:
        """Send a long prompt there that nobody holds."""
        self.begin(await self.plan([ord(replica), *LONG], wanted=replica))

    async def chat(self, text: str, **body: Any) -> Plan:
        return await self.planner.plan("chat", {"messages": [{"role": "user", "content": text}], **body}, ANONYMOUS)

    def limit(self, context_tokens: int) -> None:
        self.models = ServedModels(b"", {}, context_tokens)
