"""The agent that keeps this node among others, as a child process: started, restarted if it ends, ended with us.

Nothing waits for it: while it is away this node goes on alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

import gateway
from engine.joined_fleet import NODES_FILE
from engine.node.fetch_counts import FETCHES_FILE
from gateway.errors import SettingsError
from gateway.settings import Settings
from gateway.settings_nodes import node_settings
from transport.node.messages import NodeError

AGENT = "engine.node"
LOG = "node.log"
PAUSE_SECONDS = 1.0
PAUSE_SECONDS_MAX = 30.0
END_SECONDS_MAX = 5.0
LOOK_SECONDS = 1.0
SILENT_LOOKS_MAX = 10
"""An agent that wrote nothing for so many looks is stopped or stuck, and is killed: whoever asks it would wait."""
_logger = logging.getLogger(__name__)


def check_nodes(settings: Settings) -> None:
    """Raise SettingsError if this node cannot be one among others, as it is wanted to be."""
    try:
        if settings.node_name:
            node_settings(settings, settings, "")
        elif settings.node_address or settings.node_peers or settings.join:
            raise NodeError("node_name: a node among others needs a name, such as --node-name node-a")
    except NodeError as error:
        raise SettingsError(str(error)) from error


@contextlib.asynccontextmanager
async def beside_others(settings: Settings) -> AsyncIterator[None]:
    """Run the node's agent meanwhile, if this node has a name among others."""
    if not settings.node_name:
        yield
        return
    told = msgspec.json.encode(node_settings(settings, settings, gateway.__version__)) + b"\n"
    task = asyncio.create_task(_keep(told, settings), name="the node's agent")
    task.add_done_callback(_tell_of_defect)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _tell_of_defect(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _logger.error("%s is kept no more, other nodes are not reached", task.get_name(), exc_info=error)


async def _keep(told: bytes, settings: Settings) -> None:
    log, pause = settings.log_dir / LOG, PAUSE_SECONDS
    while True:
        began = time.monotonic()
        try:
            ended = _ending(await _run(told, log, settings.run_dir), log)
        except OSError as error:  # such as a shortage of memory or descriptors, which passes
            ended = f"cannot be started: {error}"
        _forget_nodes(settings.run_dir)  # one that was killed left it: nothing leads there any more
        pause = PAUSE_SECONDS if time.monotonic() - began > PAUSE_SECONDS_MAX else min(2 * pause, PAUSE_SECONDS_MAX)
        _logger.warning("the node's agent %s; other nodes are not reached until it is started again", ended)
        await asyncio.sleep(pause)


def _ending(code: int, log: Path) -> str:
    """How an agent ended, by its exit status as asyncio has it: negative for a signal, of which its own log knows nothing."""
    if code >= 0:
        return f"ended with {code}, {log} says why"
    names = {int(number): number.name for number in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}"


async def _run(told: bytes, log: Path, run_dir: Path) -> int:
    """Run an agent to its end; cancelled, end it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        command = (sys.executable, "-m", AGENT)
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=descriptor, stderr=descriptor, env=_environment()
        )
    finally:
        os.close(descriptor)
    assert process.stdin is not None
    watching = asyncio.create_task(_watch(process, run_dir / FETCHES_FILE))
    try:
        with contextlib.suppress(ConnectionError):
            process.stdin.write(told)
            await process.stdin.drain()
        return await process.wait()
    finally:
        watching.cancel()
        if process.returncode is None:
            process.stdin.close()  # which ends it
            try:
                async with asyncio.timeout(END_SECONDS_MAX):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _watch(process: asyncio.subprocess.Process, written: Path) -> None:
    """Kill an agent that began to write a file again and again, and does so no more.

    Looks are counted, not seconds: of those in which this machine stood still as a whole nobody is guilty.
    """
    first = last = _stamp(written)
    silent = 0
    while silent < SILENT_LOOKS_MAX:
        await asyncio.sleep(LOOK_SECONDS)
        now = _stamp(written)
        silent = silent + 1 if now == last != first else 0
        last = now
    _logger.warning("the node's agent is stopped, or stuck: it is killed")
    with contextlib.suppress(ProcessLookupError):  # it has ended just now
        process.kill()


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _environment() -> dict[str, str]:
    """Ours, without our settings, which may hold keys, and with our packages in its path."""
    root = str(Path(gateway.__file__).resolve().parents[1])
    path = [part for part in (root, os.environ.get("PYTHONPATH", "")) if part]
    return {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")} | {
        "PYTHONPATH": os.pathsep.join(path)
    }


def _forget_nodes(run_dir: Path) -> None:
    for name in (NODES_FILE, FETCHES_FILE):
        (run_dir / name).unlink(missing_ok=True)
