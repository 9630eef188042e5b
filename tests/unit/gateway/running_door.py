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

from engine.fleet import FleetSnapshot, FleetView, Replica, ReplicaState
from gateway.admin.app import build_app
from gateway.admin.offline_document import NothingKept
from gateway.api.endpoints import ENDPOINTS, Endpoint
from gateway.errors import NoReplicaReady, ReplicaNotReady, UnknownReplica
from gateway.http_server.request_cycle import Asgi
from gateway.http_server.server import DoorServer, bind, build_server
from gateway.kept_prefixes.shapes import PrefixReport
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.stats import LedgerStats
from gateway.limits.limiter import Limiter
from gateway.limits.prices import Prices
from gateway.limits.request_size import PromptSize
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.planner.plan import SteeringStats
from gateway.prompts.parity import KindVerdict
from gateway.prompts.tokenizer.service import TokenizerStats
from gateway.relay.admission import Admission
from gateway.relay.frontdoor import FrontDoor
from gateway.relay.going_on import GoingOn
from gateway.relay.large_bodies.pool import LargeBodies
from gateway.relay.relay import Relay
from gateway.relay.request_record import Meter
from gateway.relay.served_fleets import ServedFleet, ServedFleets
from gateway.replica_control.shapes import ControlledReplica, ReplicaList, Step
from gateway.settings import Settings
from gateway.settings_limits import limits_address
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
from gateway.tenants.salts import read_salt_secret
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

    def __init__(self, model: str = "fake-model") -> None:
        self.model = model
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
        return FleetSnapshot(self.version, self.model, self.model, "", tuple(self.replicas.values()))

    def suspect(self, name: str, *, overdue: bool = False) -> None:
        self.suspects.append(name)


@dataclass(frozen=True)
class FakePlan:
    replica: Replica
    prompt: list[Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    cache_salt: str | None = None
    held_bytes: int = 0
    prompt_tokens: int = 0


@dataclass
class FakePlanner:
    """The first ready replica gets everything."""

    fleet: FakeFleet
    prompt: list[Any] | None = None
    held_bytes: int = 0
    error: Exception | None = None
    plans: list[FakePlan] = field(default_factory=list)
    size: PromptSize = field(default_factory=lambda: PromptSize(0, 1, certain=True))
    endpoint: Endpoint = "completions"

    async def read(
        self,
        endpoint: Endpoint,
        body: dict[str, Any],
        tenant: TenantContext,
        *,
        wanted_replica: str | None,
        known: object = None,
    ) -> tuple[Replica, str | None]:
        self.endpoint = endpoint
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

    def knows_prompt(self, plan: FakePlan) -> bool:
        return False

    def go_on(
        self, plan: FakePlan, output: Sequence[int], *, chat: bool, prompt: Sequence[int] | None, exclude: Set[str]
    ) -> FakePlan | None:
        if prompt is None:
            return None
        found = self._plan(self._first(exclude), plan.cache_salt)
        ids = [*prompt, *output]
        if chat:
            assert found.kv_transfer_params is not None
            return replace(found, kv_transfer_params={**found.kv_transfer_params, "prompt_token_ids": ids})
        return replace(found, prompt=ids)

    def _first(self, exclude: Set[str]) -> Replica:
        for found in self.fleet.snapshot().ready():
            if found.name not in exclude:
                return found
        raise NoReplicaReady

    def _plan(self, chosen: Replica, salt: str | None) -> FakePlan:
        traits = ENDPOINTS[self.endpoint]
        hint = {"peerkv": {"source": "", "tag": "t"}} if traits.takes_hint else None
        plan = FakePlan(chosen, self.prompt, hint, salt if traits.takes_salt else None, self.held_bytes)
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

    def stats(self, model: str = "") -> KvStats:
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

    def prefixes(self, limit: int, model: str = "") -> PrefixReport:
        return PrefixReport(tracked_blocks=0, tracked_blocks_max=limit, prefixes=[])

    def explain(self, request_id: str) -> Explanation | None:
        return explain(request_id, (), {}) if request_id == "known" else None

    def place(self, model: str) -> int:
        return 0

    def ejection(self, replica: str) -> Ejection:
        return self.ejections.get(replica, NEVER)

    def warnings(self) -> list[str]:
        return []

    async def metrics(self) -> tuple[bytes, str]:
        return b"peerkv_up 1\n", "text/plain; version=0.0.4"


class FakeControl:
    """Says what it is asked to do."""

    def all(self) -> ReplicaList:
        return ReplicaList(restartable=True, replicas=[])

    async def drain(self, name: str, *, force: bool = False) -> ControlledReplica:
        return self._done(name, "draining")

    async def resume(self, name: str) -> ControlledReplica:
        return self._done(name, "ready")

    async def restart(self, name: str, *, force: bool = False) -> ControlledReplica:
        return self._done(name, "draining", Step.RESTARTING)

    def _done(self, name: str, state: str, step: Step = Step.NONE) -> ControlledReplica:
        return ControlledReplica(name=name, state=state, reason="", device="cpu", restarts=0, requests=0, step=step)


@dataclass
class Door:
    """A running front door."""

    url: str
    port: int
    fleets: ServedFleets[FakePlan]
    relay: Relay[FakePlan]
    limiter: Limiter
    tenants: Tenants
    upstream: Upstream
    server: DoorServer
    directory: Path
    session: aiohttp.ClientSession
    stack: contextlib.AsyncExitStack

    @property
    def fleet(self) -> FakeFleet:
        """The first fleet, as are the planner and the recorder."""
        return fake_fleet(self.fleets.first)

    @property
    def planner(self) -> FakePlanner:
        planner = self.fleets.first.planner
        assert isinstance(planner, FakePlanner)
        return planner

    @property
    def recorder(self) -> FakeRecorder:
        recorder = self.fleets.first.recorder
        assert isinstance(recorder, FakeRecorder)
        return recorder

    async def add_engine(self, name: str, *arguments: str, fleet: FakeFleet | None = None) -> Any:
        """A fake engine in this process, ready, in the first fleet unless another one is given."""
        socket = self.directory / f"{name}.sock"
        args = fake_engine.arguments(["--uds", str(socket), *arguments])
        engine = fake_engine.FakeEngine(args)
        runner = web.AppRunner(engine.app(), handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(socket)).start()
        self.stack.push_async_callback(runner.cleanup)
        (fleet or self.fleet).put(name, socket)
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
        connector = aiohttp.UnixConnector(str(self.directory / f"{name}.sock"))
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


def _tenants(settings: Settings) -> Tenants:
    secret = None if settings.salt_secret_file is None else read_salt_secret(settings.salt_secret_file)
    tenants = Tenants(settings.tenants, settings.admin_key, allow_anyone=settings.allow_anyone, salt_secret=secret)
    if settings.keys_file is not None:
        tenants.use(read_keys(settings.keys_file))
    return tenants


def _admin(
    relay: Relay[FakePlan],
    fleets: Sequence[FleetView],
    upstream: Upstream,
    access: AdminAccess,
    figures: FakeSight,
    body_bytes_max: int,
) -> Asgi:
    """The admin application, with fakes behind it."""
    admin = build_app(
        fleets=fleets,
        upstream=upstream,
        figures=figures,
        access=access,
        keeper=NothingKept(),
        replicas=FakeControl(),
        body_bytes_max=body_bytes_max,
        draining=lambda: relay.draining,
    )
    add_page(admin, access)
    return admin


def fake_fleet(served: ServedFleet[FakePlan]) -> FakeFleet:
    """The fleet that the test changes by hand."""
    assert isinstance(served.fleet, FakeFleet)
    return served.fleet


def _served(fleet: FakeFleet, upstream: Upstream, settings: Settings, *, ranked: bool) -> ServedFleet[FakePlan]:
    """What the relay sees of a fleet, with fakes behind it."""
    planner = FakePlanner(fleet)
    return ServedFleet(
        fleet=fleet,
        models=ModelsCache(fleet, upstream),
        planner=planner,
        recorder=FakeRecorder(),
        going_on=GoingOn(planner) if settings.continue_streams else None,
        admission=Admission(settings, lambda: len(fleet.snapshot().ready())) if settings.replica_requests_max else None,
        ranked=ranked,
        names=frozenset((fleet.model,)),
    )


@contextlib.asynccontextmanager
async def running_door(
    directory: Path,
    large_bodies: LargeBodies | None = None,
    meters: Sequence[Meter] = (),
    sight: FakeSight | None = None,
    ranked: bool = False,
    models: Sequence[str] = ("fake-model",),
    **values: Any,
) -> AsyncIterator[Door]:
    """A front door without engines, with a fleet for each of the `models`.

    `values` are settings, `meters` measure too, `sight` is what the admin endpoints show.
    """
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    settings = Settings(run_dir=directory, control_seconds=2, drain_seconds=1, **values)
    access = AdminAccess(settings.admin_key)
    tenants = _tenants(settings)
    address = limits_address(settings)
    limiter = Limiter(
        Prices(0.1, 1.0),
        reservation_seconds=3600,
        keys=lambda: tenants.keys,
        shared=None if address is None else SharedLimits(address, wait_seconds_max=settings.limits_valkey_wait_seconds_max),
        clock=lambda: MINUTE_OF_LIMITS,
    )
    upstream = Upstream(settings)
    fleets = ServedFleets([_served(FakeFleet(model), upstream, settings, ranked=ranked) for model in models])
    relay: Relay[FakePlan] = Relay(
        settings,
        fleets=fleets,
        upstream=upstream,
        tenants=tenants,
        access=access,
        limiter=limiter,
        large_bodies=large_bodies,
    )
    relay.records.meters = (Metrics(), *meters)
    admin = _admin(
        relay, [served.fleet for served in fleets.all], upstream, access, sight or FakeSight(), settings.body_bytes_max
    )
    server = build_server(FrontDoor(relay=relay, fleets=fleets, tenants=tenants, limiter=limiter, admin=admin), settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with contextlib.AsyncExitStack() as stack:
        await until(lambda: server.started)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        if limiter.shared is not None:
            await limiter.shared.connect()
            sharing = asyncio.create_task(limiter.shared.run(limiter.book.under_way))
            stack.push_async_callback(limiter.close)
            stack.callback(sharing.cancel)
        try:
            yield Door(
                f"http://127.0.0.1:{port}", port, fleets, relay, limiter, tenants, upstream, server, directory, session, stack
            )
        finally:
            await session.close()
            server.should_exit = True
            await serving
            for served in fleets.all:
                await served.models.close()
            await upstream.close()
