"""Signals: the first one requests an orderly stop, the second one ends the process at once.

SIGHUP says that the terminal is gone, which is a stop too, or, without one, asks to reload what can be: the keys file, the
certificate and some settings. Logs are rotated by size, or opened anew as soon as somebody moved them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Iterator

import uvloop

from engine.fleet import FleetError
from gateway.errors import GatewayError
from gateway.serve.banner import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
EXIT_FAILED = 1
EXIT_AT_ONCE = 130

_logger = logging.getLogger(__name__)
_reloads: list[Callable[[], None]] = []  # signals are the process's, and so is this


@contextlib.contextmanager
def reloading(reload: Callable[[], None]) -> Iterator[None]:
    """Have `reload` called when a SIGHUP asks for it."""
    _reloads.append(reload)
    try:
        yield
    finally:
        _reloads.remove(reload)


def run_until_stopped(work: Callable[[], Coroutine[None, None, None]]) -> int:
    """Run `work` on uvloop; the first SIGINT or SIGTERM cancels it, and it cleans up. Returns the exit status:
    0 if it was stopped or ended normally, EXIT_FAILED after a GatewayError or FleetError, which is reported in one line.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_supervise(work))


async def _supervise(work: Callable[[], Coroutine[None, None, None]]) -> int:
    task = asyncio.create_task(work())
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if stopping:
            # The replica host sees our end of its pipe close and ends what is left.
            say("exiting at once")
            os._exit(EXIT_AT_ONCE)
        stopping = True
        say("stopping; repeat to exit at once")
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop)
    has_terminal = os.isatty(STDERR)

    def hang_up() -> None:
        if has_terminal and not os.isatty(STDERR):
            stop()
            return
        say("SIGHUP: keys, certificate and settings are read again, logs that were moved are opened anew")
        for reload in _reloads:
            reload()

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
    except (GatewayError, FleetError) as error:
        say(f"error: {error}")
        return EXIT_FAILED
    except OSError as error:
        _logger.debug("ended by", exc_info=True)
        say(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        return EXIT_FAILED
    except Exception:
        _logger.exception("the gateway failed because of a defect in peerkv")
        return EXIT_FAILED
    return 0
