"""`python -m engine.node`: the agent as a process. Its settings come as JSON on stdin, whose end is its own."""

import asyncio
import contextlib
import logging
import os
import signal
import sys

import msgspec

from engine.node.agent import Agent
from engine.node.settings import NodeSettings
from transport.errors import is_shortage
from transport.node.messages import NodeError

SETTINGS_BYTES_MAX = 1 << 20
_logger = logging.getLogger(__name__)


async def _run(settings: NodeSettings) -> None:
    agent = asyncio.create_task(Agent(settings).run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, agent, f"{number.name} came")
    loop.add_reader(sys.stdin.fileno(), _look_for_end, agent, loop)
    with contextlib.suppress(asyncio.CancelledError):
        await agent


def _look_for_end(agent: "asyncio.Task[None]", loop: asyncio.AbstractEventLoop) -> None:
    """End the agent at the end of stdin, once: another cancellation would break off its own clearing up."""
    if not os.read(sys.stdin.fileno(), 1024):
        loop.remove_reader(sys.stdin.fileno())
        _end(agent, "its stdin ended, as that of a gateway that goes")


def _end(agent: "asyncio.Task[None]", why: str) -> None:
    _logger.info("the node's agent ends: %s", why)
    agent.cancel()


def main() -> int:
    """Run until stdin ends."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    line = sys.stdin.buffer.readline(SETTINGS_BYTES_MAX)
    try:
        asyncio.run(_run(msgspec.json.decode(line, type=NodeSettings)))
    except (NodeError, OSError, RuntimeError, msgspec.MsgspecError) as error:
        if isinstance(error, RuntimeError) and not is_shortage(error):
            raise
        print(f"the node's agent: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
