"""Entry point: `python -m engine.frame_tiers`, started by the replica host with its configuration in VARIABLE."""

import asyncio
import logging
import os
import signal
import sys

import msgspec

from engine.frame_tiers.config import VARIABLE, decode_config
from engine.frame_tiers.secrecy import SecretRefused
from engine.frame_tiers.service import Service


async def _until_told() -> None:
    service = Service(decode_config(os.environ.get(VARIABLE, "")))
    running = asyncio.ensure_future(service.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        return


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        asyncio.run(_until_told())
    except (msgspec.MsgspecError, OSError, ImportError, SecretRefused) as error:
        sys.exit(f"the frame tiers cannot start: {error}")
