"""A real front door on loopback over fake engines on real unix sockets, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from engine.fleet import FleetSnapshot, Replica, ReplicaState
from gateway.admin.app import build_app
from gateway.admin.offline_document import NothingKept
from gateway.errors import NoReplicaReady, ReplicaNotReady, UnknownReplica
from gateway.http_server.server import DoorServer, bind, build_server
from gateway.kept_prefixes.shapes import PrefixReport
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.stats import LedgerStats
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices
from gateway.limits.request_size import PromptSize
from gateway.planner.plan import SteeringStats
from gateway.prompts.parity import KindVerdict
from gateway.prompts.tokenizer.service import TokenizerStats
from gateway.relay.frontdoor import FrontDoor
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.relay.relay import Relay
from gateway.relay.request_record import Meter
from gateway.settings import Settings
from gateway.stats.explain import Explanation, explain
from gateway.stats.prometheus import Metrics
from gateway.stats.shapes import (
    GatewayStats,
    KvStats,
    ParityStats,
    TokenCounts,
    Totals,
    TransferCounts,
)
from gateway.steering.costs.model import CostStats
from gateway.steering.outliers import NEVER, Ejection
from gateway.tenants.access import AdminAccess
from gateway.tenants.key_file import read_keys
from gateway.tenants.tenants import TenantContext, Tenants
from gateway.ui.routes import add_page
from gateway.upstream.pool import Upstream
from gateway.upstream.served_models import ModelsCache
from tests import fake_engine
from tests.unit.gateway.ledger.begun_attempts import begun

FAKE_ENGINE = Path(__file__).parents[2] / "fake_engine.py"
DEADLINE_SECONDS = 15.0
MINUTE_OF_LIMITS = 1_800_000_000.0
"""It does not end while a test runs."""


async def until(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """Wait for the condition to become true; it may be a coroutine function."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, "the condition did not become true in time"
        await asyncio.sleep(0.01)


class FakeFleet:
    """A fleet that the test changes by hand."""

    def __init__(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.version = 0
        self.suspects: list[str] = []

    def put(self, name: str, socket: Path | str, state: ReplicaState = ReplicaState.READY, reason: str = "") -> None:
        self.version += 1
        self.replicas[name] = Replica(name, state, str(socket), 1, 0, reason, "cpu", "/dev/null")

    def set_state(self, name: str, state: ReplicaState, reason: str = "") -> None:
        self.version += 1
        self.replicas[name] = replace(self.replicas[name], state=state, reason=reason)

    def snapshot(self) -> FleetSnapshot:
        return FleetSnapshot(self.version, "fake-model", "fake-model", "", tuple(self.replicas.values()))

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        self.suspects.append(name)


@dataclass(frozen=True)
class FakePlan:
    replica: Replica
    prompt: list[Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None
    held_bytes: int = 0


@dataclass
class FakePlanner:
    """The first ready replica gets everything."""

    fleet: FakeFleet
    prompt: list[Any] | None = None
    held_bytes: int = 0
    error: Exception | None = None
    plans: list[FakePlan] = field(default_factory=list)
    size: PromptSize = field(default_factory=lambda: PromptSize(0, 1, certain=True))

    async def read(
        self, endpoint: str, body: dict[str, Any], tenant: TenantContext, *, wanted_replica: str | None, known: object = None
    ) -> tuple[Replica, str | None]:
        self.size = PromptSize(len(str(body.get("prompt"))), 1, certain=True)
        if self.error is not None:
            raise self.error
        if wanted_replica is not None:
            found = self.fleet.replicas.get(wanted_replica)
            if found is None:
                raise UnknownReplica(wanted_replica, self.fleet.replicas)
            if found.state is not ReplicaState.READY:
                raise ReplicaNotReady(wanted_replica, found.state)
            return found, tenant.salt or None
        return self._first(frozenset()), tenant.salt or None

    def prompt_size(self, request: tuple[Replica, str | None]) -> PromptSize:
        return self.size

    def uncached_tokens(self, request: tuple[Replica, str | None]) -> int:
        return self.size.tokens

    def decide(self, request: tuple[Replica, str | None]) -> FakePlan:
        return self._plan(*request)

    def replan(self, plan: FakePlan, *, exclude: Set[str]) -> FakePlan:
        return self._plan(self._first(exclude), plan.cache_salt)

    def _first(self, exclude: Set[str]) -> Replica:
        for found in self.fleet.snapshot().ready():
            if found.name not in exclude:
                return found
        raise NoReplicaReady

    def _plan(self, chosen: Replica, salt: str | None) -> FakePlan:
        plan = FakePlan(chosen, self.prompt, {"peerkv": {"source": "", "tag": "t"}}, salt, self.held_bytes)
        self.plans.append(plan)
        return plan


class FakeRecorder:
    """Writes down what it is told; `events` have the replica's name, and the status of ended attempts."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.events: list[tuple[Any, ...]] = []
        self.in_flight: Counter[str] = Counter()
        self.borne = False
        self.header = b"local=1, peer=2, computed=3, reason=cold"

    def begin(self, plan: FakePlan, info: RequestInfo) -> Attempt:
        name = plan.replica.name
        attempt = begun(len(self.attempts) + 1, request_id=info.request_id, replica=name)
        attempt.info = info
        self.attempts.append(attempt)
        self.events.append(("begun", name))
        self.in_flight[name] += 1
        return attempt

    def first_byte(self, attempt: Attempt) -> bytes:
        self.events.append(("first byte", attempt.replica))
        return self.header

    def stream_begins(self, attempt: Attempt) -> bytes:
        return self.first_byte(attempt)

    def was_borne(self, attempt: Attempt) -> bool:
        return self.borne

    def ended(self, attempt: Attempt, status: int) -> None:
        self.events.append(("ended", attempt.replica, status))
        self.in_flight[attempt.replica] -= 1


class FakeSight:
    """Nothing to see, but for the ejections that a test puts here."""

    def __init__(self) -> None:
        self.ejections: dict[str, Ejection] = {}

    def stats(self) -> KvStats:
        tokens, counts = TokenCounts(), TransferCounts()
        return KvStats(
            model="fake-model",
            gateway=GatewayStats(version="0", uptime_seconds=0.0),
            steering=SteeringStats(),
            costs=CostStats(),
            ledger=LedgerStats(),
            tokenizer=TokenizerStats(loaded=False, chat=False, directory="", reason="", chat_reason=""),
            parity=ParityStats(replica="", completions=KindVerdict(), chat=KindVerdict()),
            totals=Totals(replicas=0, ready=0, blocks=0, cached_blocks=0, in_flight=0, tokens=tokens, counts=counts),
            replicas=[],
            host_memory=[],
        )

    def prefixes(self, limit: int) -> PrefixReport:
        return PrefixReport(tracked_blocks=0, tracked_blocks_max=limit, prefixes=[])

    def explain(self, request_id: str) -> Explanation | None:
        return explain(request_id, (), {}) if request_id == "known" else None

    def ejection(self, replica: str) -> Ejection:
        return self.ejections.get(replica, NEVER)

    def warnings(self) -> list[str]:
        return []

    async def metrics(self) -> tuple[bytes, str]:
        return b"peerkv_up 1\n", "text/plain; version=0.0.4"


@dataclass
class Door:
    """A running front door."""

    url: str
    port: int
    fleet: FakeFleet
    planner: FakePlanner
    recorder: FakeRecorder
    relay: Relay[FakePlan]
    limiter: Limiter
    tenants: Tenants
    upstream: Upstream
    server: DoorServer
    directory: Path
    session: aiohttp.ClientSession
    stack: contextlib.AsyncExitStack

    async def add_engine(self, name: str, *arguments: str) -> Any:
        """A fake engine in this process, ready."""
        socket = self.directory / f"{name}.sock"
        args = fake_engine.arguments(["--uds", str(socket), *arguments])
        engine = fake_engine.FakeEngine(args)
        runner = web.AppRunner(engine.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        self.stack.push_async_callback(runner.cleanup)
        self.fleet.put(name, socket)
        return engine

    async def add_process(self, name: str, *arguments: str) -> asyncio.subprocess.Process:
        """A fake engine in a process of its own, ready; it is ended with the door."""
        socket = self.directory / f"{name}.sock"
        process = await asyncio.create_subprocess_exec(sys.executable, str(FAKE_ENGINE), "--uds", str(socket), *arguments)
        self.stack.push_async_callback(end, process)
        await until(lambda: _listens(socket))
        self.fleet.put(name, socket)
        return process

    async def seen(self, name: str) -> dict[str, Any]:
        """What the engine of that name saw."""
        connector = aiohttp.UnixConnector(self.fleet.replicas[name].socket)
        async with aiohttp.ClientSession(connector=connector) as session, session.get("http://x/fake/seen") as answer:
            seen: dict[str, Any] = await answer.json()
            return seen

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any, Any]:
        """Status, JSON and headers of the answer to a POST."""
        options.setdefault("json", body)
        async with self.session.post(self.url + path, **options) as answer:
            return answer.status, await answer.json(), answer.headers

    async def get(self, path: str, **options: Any) -> tuple[int, Any, Any]:
        """Status, JSON and headers of the answer to a GET."""
        async with self.session.get(self.url + path, **options) as answer:
            return answer.status, await answer.json(), answer.headers


async def _listens(path: Path) -> bool:
    """Whether connections are taken there. The socket's file is there a moment earlier, and refuses them until then."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    return True


async def end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@contextlib.asynccontextmanager
async def running_door(
    directory: Path,
    large_bodies: LargeBodies | None = None,
    meters: Sequence[Meter] = (),
    sight: FakeSight | None = None,
    **values: Any,
) -> AsyncIterator[Door]:
    """Start a front door without engines; `values` are settings, `meters` measure beside the metrics, `sight` is what
    the admin endpoints show."""
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    settings = Settings(run_dir=directory, control_seconds=2, drain_seconds=1, **values)
    fleet, access, tenants = FakeFleet(), AdminAccess(settings.admin_key), Tenants(settings.tenants, settings.admin_key)
    if settings.keys_file is not None:
        tenants.use(read_keys(settings.keys_file))
    limiter = Limiter(Prices(0.1, 1.0), reservation_seconds=3600, keys=lambda: tenants.keys, clock=lambda: MINUTE_OF_LIMITS)
    planner, recorder, upstream = FakePlanner(fleet), FakeRecorder(), Upstream(settings)
    models = ModelsCache(fleet, upstream)
    relay: Relay[FakePlan] = Relay(
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
    relay.records.meters = (Metrics(), *meters)
    admin = build_app(
        fleet=fleet,
        upstream=upstream,
        figures=sight or FakeSight(),
        access=access,
        keeper=NothingKept(),
        body_bytes_max=settings.body_bytes_max,
        draining=lambda: relay.draining,
    )
    add_page(admin, access)
    server = build_server(FrontDoor(relay=relay, models=models, tenants=tenants, limiter=limiter, admin=admin), settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with contextlib.AsyncExitStack() as stack:
        await until(lambda: server.started)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        try:
            yield Door(
                f"http://127.0.0.1:{port}",
                port,
                fleet,
                planner,
                recorder,
                relay,
                limiter,
                tenants,
                upstream,
                server,
                directory,
                session,
                stack,
            )
        finally:
            await session.close()
            server.should_exit = True
            await serving
            await models.close()
            await upstream.close()
