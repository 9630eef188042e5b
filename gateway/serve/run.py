"""`peerkv serve`, `peerkv gateway` and `peerkv engine`: start, progress, orderly shutdown.

Each is a coroutine that runs until it is cancelled and cleans up after itself; it raises GatewayError or FleetError
when it cannot go on. The order of a shutdown: refuse new requests, or tell gateways elsewhere to send no more, let running
ones finish, stop the replicas, close the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.fleet import FileFleet, FleetControl, FleetError, FleetSnapshot, FleetView, Replica, ReplicaState, reasons_in_words
from engine.host_process.directories import wait_until_free
from engine.joined_fleet import JoinedFleet
from engine.replicas.devices import visible_gpus
from engine.replicas.launch import EngineSettings
from engine.replicas.shared_memory_check import check_host_memory, check_room, wait_for_host_memory_dir
from engine.replicas.supervisor import Supervisor
from engine.replicas.tier_check import check_tiers, loss_without_room
from gateway import __version__
from gateway.admin.audit_chain import AuditLog
from gateway.block_registry.fleet_watch import HOLD_SECONDS
from gateway.http_server.certificate import Certificate
from gateway.http_server.server import DoorServer, bind, build_server
from gateway.serve.banner import banner, say, still_starting
from gateway.serve.descriptors import fitted, in_words, limits, raise_limit
from gateway.serve.fleet_parts import GivenFleet
from gateway.serve.fleets import each_fleet, engine_fleets, with_host_memory
from gateway.serve.memory import settle_memory
from gateway.serve.model_choice import with_model
from gateway.serve.other_nodes import beside_others, check_nodes
from gateway.serve.reloading import OF_ENGINE, Again, Reloading
from gateway.serve.signals import reloading
from gateway.serve.starting import StartingDoor, Switch
from gateway.serve.wiring import Door, Logs, build_door
from gateway.settings import Settings
from gateway.stats.log_file import STDOUT, LogFile
from gateway.stats.request_log import RequestLog
from gateway.stats.traces import Traces
from gateway.tenants.access import open_to_others

SETTLE_SECONDS_MAX = 20.0  # from the first ready replica to the banner, while others still start
HEARTBEAT_SECONDS = 15.0
WATCH_SECONDS = 0.2

_logger = logging.getLogger(__name__)


class WantedFleet(NamedTuple):
    """A fleet that is to be run, as the gateway and as the supervisor is told."""

    settings: Settings
    engine: EngineSettings


async def serve(settings: Settings, again: Again | None = None) -> None:
    """Run the gateway and its replicas; `again` loads the settings anew."""
    check_nodes(settings)
    loaded = settings
    settings = _with_descriptors(settings)
    async with contextlib.AsyncExitStack() as stack:
        logs = _logs(stack, settings)
        starting = StartingDoor("preparing the model")
        server, switch = await stack.enter_async_context(_serving(settings, starting))
        fleets = await _wanted_fleets(settings)
        starting.reason = "starting the replicas"
        supervisors = await stack.enter_async_context(_supervised(settings, fleets))
        controls: Sequence[FleetControl] = supervisors
        if settings.node_name:  # which has one fleet
            controls = [JoinedFleet(supervisor, settings.run_dir) for supervisor in supervisors]
        given = [
            GivenFleet(each.settings, control, control.snapshot(), settings.pin_share_max)
            for each, control in zip(fleets, controls, strict=True)
        ]
        door = await _open(stack, (settings, loaded, again), given, server, switch, logs)
        await stack.enter_async_context(beside_others(settings))
        async with _heartbeat(supervisors):
            await _first_ready(supervisors)
            await _settle(supervisors)
        snapshots = [supervisor.snapshot() for supervisor in supervisors]
        told = settings.model_copy(update={"host_memory": sum(each.engine.host_memory for each in fleets)})
        _show(settings, banner(told, snapshots, settings.log_dir, door.figures.warnings()))
        await _while_there_is_hope(supervisors)


async def gateway(settings: Settings, again: Again | None = None) -> None:
    """Run only the front door, for the replicas that another process runs in `run_dir`; `again` loads the settings anew."""
    loaded = settings
    settings = _with_descriptors(settings)
    async with contextlib.AsyncExitStack() as stack:
        logs = _logs(stack, settings)
        fleets = [(each, FileFleet(each.run_dir, hold_seconds=HOLD_SECONDS)) for each in each_fleet(settings)]
        where = ", ".join(str(each.run_dir) for each, _ in fleets)
        starting = StartingDoor(f"waiting for the replicas of {where}, which `peerkv engine` starts")
        server, switch = await stack.enter_async_context(_serving(settings, starting))
        say(starting.reason)
        seconds = settings.startup_seconds_max
        snapshots = await asyncio.gather(*(_wait_for(fleet, each.run_dir, seconds) for each, fleet in fleets))
        given = [
            GivenFleet(each, JoinedFleet(fleet, each.run_dir, hold_seconds=HOLD_SECONDS), found, None)
            for (each, fleet), found in zip(fleets, snapshots, strict=True)
        ]
        door = await _open(stack, (settings, loaded, again), given, server, switch, logs)

        def now() -> list[FleetSnapshot]:
            return [_same(one.found, fleet.snapshot()) for one, (_, fleet) in zip(given, fleets, strict=True)]

        await _until(lambda: any(snapshot.ready() for snapshot in now()))
        _show(settings, banner(settings, now(), None, door.figures.warnings()))
        await _until(lambda: not now())  # never: it goes on until _same raises


async def engine(settings: Settings, again: Again | None = None) -> None:
    """Run only the replicas; `again` loads the settings anew."""
    check_nodes(settings)
    raise_limit()
    in_force = Reloading(settings, again, lambda fresh: None, OF_ENGINE)
    fleets = await _wanted_fleets(settings)
    with reloading(in_force):
        await _run_replicas(settings, fleets, lambda: in_force.settings.drain_seconds)


async def _run_replicas(settings: Settings, fleets: Sequence[WantedFleet], drain_seconds: Callable[[], float]) -> None:
    async with _supervised(settings, fleets, drain_seconds=drain_seconds) as supervisors, beside_others(settings):
        async with _heartbeat(supervisors):
            await _first_ready(supervisors)
            await _settle(supervisors)
        ready = sum(len(supervisor.snapshot().ready()) for supervisor in supervisors)
        where = ", ".join(str(each.settings.run_dir) for each in fleets)
        say(f"{'1 replica is' if ready == 1 else f'{ready} replicas are'} ready; a gateway will find them in {where}")
        await _while_there_is_hope(supervisors)


def _with_descriptors(settings: Settings) -> Settings:
    """Return the settings with bounds that fit to the descriptors that may be had."""
    descriptors = raise_limit()
    fitting = fitted(settings, descriptors)
    if words := in_words(settings, fitting, descriptors):
        say(words)
    return fitting


def _logs(stack: contextlib.AsyncExitStack, settings: Settings) -> Logs:
    """The logs that are wanted; they are closed with the stack. Raises SettingsError."""
    requests = audit = traces = None
    if settings.request_log:
        file = LogFile(settings.request_log)
        stack.push_async_callback(file.close)
        requests = RequestLog(file)
    if settings.audit_log is not None:
        audit = AuditLog(settings.audit_log)
        stack.callback(audit.close)
    if settings.otlp_traces_endpoint:
        traces = Traces(settings.otlp_traces_endpoint, __version__)
        stack.push_async_callback(asyncio.to_thread, traces.close)
    return Logs(requests, audit, traces)


def _show(settings: Settings, text: str) -> None:
    """Print to standard output, unless that is the request log."""
    print(text, file=sys.stderr if settings.request_log == STDOUT else sys.stdout, flush=True)


@contextlib.asynccontextmanager
async def _serving(settings: Settings, first: StartingDoor) -> AsyncIterator[tuple[DoorServer, Switch]]:
    """An HTTP server on the settings' address. Raises SettingsError when the address cannot be had."""
    if warning := open_to_others(settings):
        say(f"warning: {warning}")
    listener = bind(settings.host, settings.port, reuse_port=settings.reuse_port)
    switch = Switch(first)
    async with contextlib.AsyncExitStack() as stack:
        server = build_server(switch, settings, _certificate(stack, settings))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield server, switch
        finally:
            server.should_exit = True
            await serving


def _certificate(stack: contextlib.AsyncExitStack, settings: Settings) -> Certificate | None:
    """The certificate if there is one; it is watched until the stack closes. Raises SettingsError."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    certificate = Certificate(settings.tls_cert, settings.tls_key)
    _keep_running(stack, "the watch over the certificate", certificate.watch.run())
    stack.enter_context(reloading(certificate.watch.reload))
    return certificate


async def _wanted_fleets(settings: Settings) -> list[WantedFleet]:
    """The fleets with their models. Raises FleetError if these cannot run here, or their directories are another's, before a
    model is fetched for them."""
    devices = await asyncio.to_thread(visible_gpus, os.environ)
    fleets = each_fleet(settings)
    wanted = engine_fleets(settings, fleets, devices)
    check_room(*wanted)
    check_tiers(*wanted, sized_later=any(each.host_memory == "auto" for each in fleets))
    for each in wanted:
        await wait_until_free((each.run_dir, each.table_dir), each.claim_seconds_max, say)
    await wait_for_host_memory_dir(*wanted)
    fleets = tuple([await with_model(each) for each in fleets])
    engines = with_host_memory(fleets, engine_fleets(settings, fleets, devices))
    check_host_memory(*engines)
    if warning := loss_without_room(*engines):
        say(f"warning: {warning}")
    return [WantedFleet(each, engine) for each, engine in zip(fleets, engines, strict=True)]


@contextlib.asynccontextmanager
async def _supervised(
    settings: Settings, fleets: Sequence[WantedFleet], *, drain_seconds: Callable[[], float] = float
) -> AsyncIterator[list[Supervisor]]:
    """A started supervisor for each fleet, whose replicas have `drain_seconds` to finish their requests at the end.

    Raises FleetError.
    """
    supervisors = [Supervisor(each.engine, say) for each in fleets]
    try:
        for supervisor in supervisors:
            await supervisor.start()
        yield supervisors
    finally:
        seconds = drain_seconds()  # float() is none
        if seconds and any(supervisor.snapshot().ready() for supervisor in supervisors):
            say(f"waiting up to {seconds:g} s for the replicas' requests to finish; gateways send them no others")
            if not all(await asyncio.gather(*(supervisor.drain_all(seconds) for supervisor in supervisors))):
                say(f"ending replicas whose requests did not finish in {seconds:g} s")
        await asyncio.gather(*(supervisor.stop(settings.terminate_seconds) for supervisor in supervisors))


async def _open(
    stack: contextlib.AsyncExitStack,
    known: tuple[Settings, Settings, Again | None],
    given: Sequence[GivenFleet],
    server: DoorServer,
    switch: Switch,
    logs: Logs,
) -> Door:
    """Wire the front door for the fleets `given` and serve it from now on; it is drained when the stack closes.

    `known` are the settings, those that they were made of, and what loads these anew.
    """
    settings, loaded, again = known
    door = build_door(settings, given, logs)
    in_force = Reloading(loaded, again, lambda fresh: door.use(_within(fresh, settings)))
    stack.enter_context(reloading(in_force))
    if door.limiter.shared is not None:
        await door.limiter.shared.connect()
    _keep_running(stack, "the keeping of limits", door.limiter.run())  # to be ended after the last request
    stack.push_async_callback(_drain, door, server, in_force)
    for fleet in door.fleets:
        for what, work in fleet.work():
            _keep_running(stack, what, work)
    if door.keys is not None:
        _keep_running(stack, "the watch over the keys file", door.keys.run())
        stack.enter_context(reloading(door.keys.reload))
    _keep_running(stack, "the comments to clients that wait for streams", door.relay.keep_alive.run())
    switch.app = door.app
    settle_memory()
    return door


def _keep_running(stack: contextlib.AsyncExitStack, what: str, work: Coroutine[Any, Any, None]) -> None:
    """Have work that never ends done until the stack closes."""
    task = asyncio.create_task(work, name=what)
    task.add_done_callback(_tell_of_defect)
    stack.push_async_callback(_end, task)


def _within(fresh: Settings, settings: Settings) -> Settings:
    """Fresh settings with no more requests at once than there are descriptors for."""
    most = fitted(settings.model_copy(update={"requests_in_flight_max": 1 << 30}), limits()[0]).requests_in_flight_max
    return fresh.model_copy(update={"requests_in_flight_max": min(fresh.requests_in_flight_max, most)})


async def _drain(door: Door, server: DoorServer, in_force: Reloading) -> None:
    server.should_exit = True
    seconds = in_force.settings.drain_seconds
    if door.relay.in_flight:
        say(f"waiting up to {seconds:g} s for running requests ({door.relay.in_flight}) to finish")
    await door.relay.drain(seconds)
    await door.close()


def _tell_of_defect(task: asyncio.Task[None]) -> None:
    """Log that a task which should run for ever has ended."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("%s ended unexpectedly: what it maintained is no longer updated", task.get_name(), exc_info=error)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _first_ready(supervisors: Sequence[Supervisor]) -> None:
    """Wait for a replica of each fleet. Raises FleetError when there is no hope for any fleet; of others it is said."""
    found = await asyncio.gather(*(supervisor.wait_ready() for supervisor in supervisors), return_exceptions=True)
    failed = [each for each in found if isinstance(each, BaseException)]
    for error in failed:
        if not isinstance(error, FleetError) or len(failed) == len(found):
            raise error


async def _settle(supervisors: Sequence[Supervisor]) -> None:
    """Wait a bounded time for the replicas that are still starting."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            await _until(lambda: all(r.state is not ReplicaState.STARTING for r in _replicas(supervisors)))
    if failed := [replica for replica in _replicas(supervisors) if replica.state is ReplicaState.FAILED]:
        say(reasons_in_words(failed))


async def _while_there_is_hope(fleets: Sequence[FleetView]) -> None:
    """Never return. Raises FleetError once every replica has been given up."""
    await _until(lambda: all(r.state is ReplicaState.FAILED for r in _replicas(fleets)))
    raise FleetError(f"every replica failed: {reasons_in_words(_replicas(fleets))}")


def _replicas(fleets: Sequence[FleetView]) -> list[Replica]:
    return [replica for fleet in fleets for replica in fleet.snapshot().replicas]


async def _wait_for(fleet: FleetView, run_dir: Path, seconds: float) -> FleetSnapshot:
    """The first snapshot with replicas. Raises FleetError when none comes in time."""
    try:
        async with asyncio.timeout(seconds):
            await _until(lambda: bool(fleet.snapshot().replicas))
    except TimeoutError:
        raise FleetError(
            f"no replicas came up in {run_dir} within {seconds:g} s: is `peerkv engine` running with the same run_dir?"
        ) from None
    return fleet.snapshot()


def _same(found: FleetSnapshot, now: FleetSnapshot) -> FleetSnapshot:
    """Return `now` if it describes the fleet that the front door was wired for; raise FleetError if not.

    The tokenizer and the block tables belong to one model, its options and one table_dir. With others, the front door must be
    restarted.
    """
    for what in ("model", "table_dir", "vllm_args"):
        before, after = getattr(found, what), getattr(now, what)
        if before != after:
            told = "" if what == "vllm_args" else f" from {before} to {after}"  # these may hold a token
            raise FleetError(f"the replicas' {what} changed{told}: restart the gateway")
    return now


async def _until(holds: Callable[[], bool]) -> None:
    """Poll every WATCH_SECONDS: the fleet may belong to another process."""
    while True:
        if holds():
            return
        await asyncio.sleep(WATCH_SECONDS)


@contextlib.asynccontextmanager
async def _heartbeat(supervisors: Sequence[Supervisor]) -> AsyncIterator[None]:
    """Report from time to time what starting replicas logged last."""
    task = asyncio.create_task(_beat(supervisors))
    try:
        yield
    finally:
        await _end(task)


async def _beat(supervisors: Sequence[Supervisor]) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        for supervisor in supervisors:
            for replica in supervisor.snapshot().replicas:
                if replica.state is ReplicaState.STARTING:
                    say(still_starting(replica, supervisor.last_line(replica.name)))
