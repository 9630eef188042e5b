"""Notices that the keys file was changed, and has the tenants use the new one. A broken file changes nothing."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from gateway.tenants.key_file import KeyFileError, read_keys
from gateway.tenants.tenants import Tenants

POLL_SECONDS = 1.0
_logger = logging.getLogger(__name__)

Signature = tuple[int, int, int] | None


class KeyWatch:
    """Looks at the file every POLL_SECONDS, and at once when `reload` was called. Belongs to one event loop."""

    def __init__(self, path: Path, tenants: Tenants, poll_seconds: float = POLL_SECONDS) -> None:
        self._path = path
        self._tenants = tenants
        self._poll_seconds = poll_seconds
        self._asked = asyncio.Event()
        self._seen: Signature = None
        self._complaint = ""

    def reload(self) -> None:
        """Read the file now, changed or not."""
        self._seen = None
        self._asked.set()

    async def run(self) -> None:
        """Watch for ever."""
        while True:
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            try:
                await self.look()
            except Exception:  # whatever it was, a key that is revoked later has to be noticed
                _logger.exception("the keys file %s could not be looked at", self._path)

    async def look(self) -> None:
        """Take over the file's content if it is another file than the one seen last."""
        signature = await asyncio.to_thread(_signature, self._path)
        if signature is not None and signature == self._seen:
            return
        try:
            keys = await asyncio.to_thread(read_keys, self._path)
        except KeyFileError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                _logger.error("%s; the keys of before stay in use", error)
            self._seen = signature
            return
        if self._seen is not None or self._complaint:
            _logger.info("the keys file %s was read again: %d keys", self._path, len(keys.keys))
        self._complaint = ""
        self._seen = signature
        self._tenants.use(keys)


def _signature(path: Path) -> Signature:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
