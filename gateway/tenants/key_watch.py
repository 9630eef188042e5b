"""The watch over the keys file, which has the tenants use the new one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.file_watch import POLL_SECONDS, FileWatch
from gateway.tenants.key_file import read_keys
from gateway.tenants.tenants import Tenants


def watch_keys(path: Path, tenants: Tenants, poll_seconds: float = POLL_SECONDS) -> FileWatch:
    """Watch over the file, once it is run."""

    async def take() -> str:
        keys = await asyncio.to_thread(read_keys, path)
        tenants.use(keys)
        return f"the keys file {path} was read again: {len(keys.keys)} keys"

    return FileWatch([path], take, "the previous keys stay in use", poll_seconds)
