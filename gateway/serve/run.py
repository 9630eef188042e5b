"""`peerkv serve`, `peerkv gateway` and `peerkv engine`: start, progress, orderly shutdown.

Each is a coroutine that runs until it is cancelled and cleans up after itself; it raises GatewayError or FleetError
when it cannot go on. The order of a shutdown: refuse new requests, let running ones finish, stop the replicas,
close the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from engine.fleet import FileFleet, FleetError, FleetSnapshot, FleetView, ReplicaState, reasons_in_words
from engine.replicas.devices import visible_gpus
from engine.replicas.shared_memory_check import check_room
from engine.replicas.supervisor import Supervisor
from gateway.block_registry.fleet_watch import HOLD_SECONDS
from gateway.http_server.server import DoorServer, bind, build_server
from gateway.prompts.parity_watch import ParityWatch
from gateway.serve.banner import banner, say
from gateway.serve.descriptors import fitted, in_words, raise_limit
from gateway.serve.memory import settle_memory
from gateway.serve.model_choice import with_model
from gateway.serve.signals import reloading
from gateway.serve.starting import StartingDoor, Switch
from gateway.serve.wiring import Door, build_door
from gateway.settings import Settings, engine_settings
from gateway.stats.log_file import STDOUT, LogFile
from gateway.stats.request_log import RequestLog
from gateway.tenants.access import open_to_others

SETTLE_SECONDS_MAX = 20.0  # from the first ready replica to the banner, while others still start
HEARTBEAT_SECONDS = 15.0
WATCH_SECONDS = 0.2
LOG_LINE_SHOWN = 120

_logger = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Run the gateway and its replicas."""
    settings = _with_descriptors(settings)
    async with contextlib.AsyncExitStack() as stack:
        request_log = _request_log(stack, settings)
        starting = StartingDoor("preparing the model")
        server, switch = await stack.enter_async_context(_serving(settings, starting))
        devices = await _devices_with_room(settings)
        settings = await with_model(settings)
        starting.reason = "starting the replicas"
        supervisor = await stack.enter_async_context(_supervised(settings, devices))
        door = await _open(
            stack, settings, supervisor, server, switch, supervisor.snapshot(), request_log, settings.pin_share_max
        )
        async with _heartbeat(supervisor):
            await supervisor.wait_ready()
            await _settle(supervisor)
        _show(settings, banner(settings, supervisor.snapshot(), settings.log_dir, door.figures.warnings()))
        await _while_there_is_hope(supervisor)


async def gateway(settings: Settings) -> None:
    """Run only the front door, for the replicas that another process runs in `run_dir`."""
    settings = _with_descriptors(settings)
    async with contextlib.AsyncExitStack() as stack:
        request_log = _request_log(stack, settings)
        starting = StartingDoor(f"waiting for the replicas of {settings.run_dir}, which `peerkv engine` starts")
        server, switch = await stack.enter_async_context(_serving(settings, starting))
        fleet = FileFleet(settings.run_dir, hold_seconds=HOLD_SECONDS)
        say(starting.reason)
        found = await _wait_for(fleet, settings.startup_seconds_max)
        door = await _open(stack, settings, fleet, server, switch, found, request_log, None)
        await _until(lambda: bool(_same(found, fleet.snapshot()).ready()))
        _show(settings, banner(settings, fleet.snapshot(), None, door.figures.warnings()))
        await _until(lambda: not _same(found, fleet.snapshot()))  # never: it goes on until _same raises


async def engine(settings: Settings) -> None:
    """Run only the replicas."""
    raise_limit()
    devices = await _devices_with_room(settings)
    settings = await with_model(settings)
    async with _supervised(settings, devices) as supervisor:
        async with _heartbeat(supervisor):
            await supervisor.wait_ready()
            await _settle(supervisor)
        ready = len(supervisor.snapshot().ready())
        say(
            f"{'1 replica is' if ready == 1 else f'{ready} replicas are'} ready; a gateway will find them in {settings.run_dir}"
        )
        await _while_there_is_hope(supervisor)


def _with_descriptors(settings: Settings) -> Settings:
    """Return the settings with bounds that fit to the descriptors that may be had."""
    descriptors = raise_limit()
    fitting = fitted(settings, descriptors)
    if words := in_words(settings, fitting, descriptors):
        say(words)
    return fitting


def _request_log(stack: contextlib.AsyncExitStack, settings: Settings) -> RequestLog | None:
    """The log of requests if one is wanted; it is closed with the stack. Raises SettingsError."""
    if not settings.request_log:
        return None
    file = LogFile(settings.request_log)
    stack.push_async_callback(file.close)
    return RequestLog(file)


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
    server = build_server(switch, settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield server, switch
    finally:
        server.should_exit = True
        await serving


async def _devices_with_room(settings: Settings) -> tuple[str, ...]:
    """The GPUs for the replicas. Raises FleetError if these cannot run here, before a model is fetched for them."""
    devices = await asyncio.to_thread(visible_gpus, os.environ)
    check_room(engine_settings(settings, model=settings.model, devices=devices))
    return devices


@contextlib.asynccontextmanager
async def _supervised(settings: Settings, devices: tuple[str, ...]) -> AsyncIterator[Supervisor]:
    """A started supervisor. Raises FleetError."""
    supervisor = Supervisor(engine_settings(settings, model=settings.model, devices=devices), say)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await supervisor.stop(settings.terminate_seconds)


async def _open(
    stack: contextlib.AsyncExitStack,
    settings: Settings,
    fleet: FleetView,
    server: DoorServer,
    switch: Switch,
    found: FleetSnapshot,
    request_log: RequestLog | None,
    pin_share_max: float | None,
) -> Door:
    """Wire the front door and serve it from now on; it is drained when the stack closes."""
    table_dir = Path(found.table_dir)
    door = build_door(
        settings,
        fleet,
        model=found.model,
        vllm_args=found.vllm_args,
        table_dir=table_dir,
        pin_share_max=pin_share_max,
        request_log=request_log,
    )
    limits = asyncio.create_task(door.limiter.run(), name="the keeping of limits")
    limits.add_done_callback(_tell_of_defect)
    stack.push_async_callback(_end, limits)  # after the last request
    stack.push_async_callback(_drain, door, server, settings.drain_seconds)
    watch = ParityWatch(fleet, door.planner.prompts, door.tokens, interval_seconds=settings.parity_interval_seconds)
    parity = asyncio.create_task(watch.run(), name="the comparison of token ids with an engine's")
    parity.add_done_callback(_tell_of_defect)
    stack.push_async_callback(_end, parity)
    overdue = asyncio.create_task(door.overdue.run(), name="the watch over overdue requests")
    overdue.add_done_callback(_tell_of_defect)
    stack.push_async_callback(_end, overdue)
    keeping = asyncio.create_task(door.keeper.run(), name="the renewal of kept prefixes")
    keeping.add_done_callback(_tell_of_defect)
    stack.push_async_callback(_end, keeping)
    if door.keys is not None:
        watching = asyncio.create_task(door.keys.run(), name="the watch over the keys file")
        watching.add_done_callback(_tell_of_defect)
        stack.push_async_callback(_end, watching)
        stack.enter_context(reloading(door.keys.reload))
    waiting = asyncio.create_task(door.relay.keep_alive.run(), name="the comments to clients that wait for streams")
    waiting.add_done_callback(_tell_of_defect)
    stack.push_async_callback(_end, waiting)
    switch.app = door.app
    settle_memory()
    return door


async def _drain(door: Door, server: DoorServer, seconds: float) -> None:
    server.should_exit = True
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


async def _settle(supervisor: Supervisor) -> None:
    """Wait a bounded time for the replicas that are still starting."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SETTLE_SECONDS_MAX):
            await _until(lambda: all(r.state is not ReplicaState.STARTING for r in supervisor.snapshot().replicas))
    if failed := [replica for replica in supervisor.snapshot().replicas if replica.state is ReplicaState.FAILED]:
        say(reasons_in_words(failed))


async def _while_there_is_hope(fleet: FleetView) -> None:
    """Never return. Raises FleetError once every replica has been given up."""
    await _until(lambda: all(r.state is ReplicaState.FAILED for r in fleet.snapshot().replicas))
    raise FleetError(f"every replica failed: {reasons_in_words(fleet.snapshot().replicas)}")


async def _wait_for(fleet: FleetView, seconds: float) -> FleetSnapshot:
    """The first snapshot with replicas. Raises FleetError when none comes in time."""
    try:
        async with asyncio.timeout(seconds):
            await _until(lambda: bool(fleet.snapshot().replicas))
    except TimeoutError:
        raise FleetError(f"no replicas came up within {seconds:g} s: is `peerkv engine` running with this run_dir?") from None
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
async def _heartbeat(supervisor: Supervisor) -> AsyncIterator[None]:
    """Report from time to time what starting replicas logged last."""
    task = asyncio.create_task(_beat(supervisor))
    try:
        yield
    finally:
        await _end(task)


async def _beat(supervisor: Supervisor) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_SECONDS)
        for replica in supervisor.snapshot().replicas:
            if replica.state is ReplicaState.STARTING:
                line = supervisor.last_line(replica.name)[:LOG_LINE_SHOWN]
                say(f"{replica.name} is still starting: {line or 'nothing logged yet'}")
