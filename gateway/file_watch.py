"""Notices that files were changed, and has their content taken up again. What cannot be used changes nothing but the log."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from gateway.errors import GatewayError

POLL_SECONDS = 1.0
RETRY_LOOKS = 30
"""So many looks later, files that could not be used are tried again, though unchanged: descriptors may have run out, say."""
_logger = logging.getLogger(__name__)

Signature = tuple[tuple[int, int, int], ...]


class FileWatch:
    """Looks at the files every `poll_seconds`, and at once when `reload` was called. Belongs to one event loop.

    `take` takes their content over and returns what the log is told of it. It raises GatewayError when that cannot be used: the
    log is told once, with `instead`.
    """

    def __init__(
        self, paths: Sequence[Path], take: Callable[[], Awaitable[str]], instead: str, poll_seconds: float = POLL_SECONDS
    ) -> None:
        self._paths = tuple(paths)
        self._take = take
        self._instead = instead
        self._poll_seconds = poll_seconds
        self._asked = asyncio.Event()
        self._seen: Signature | None = None
        self._looked = False
        self._looks_since = 0
        self._complaint = ""

    def reload(self) -> None:
        """Read the files now, changed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Watch for ever."""
        while True:
            try:
                async with asyncio.timeout(self._poll_seconds):
                    await self._asked.wait()
            except TimeoutError:
                pass
            try:
                await self.look()
            except Exception:  # whatever it was, a key that is revoked later, or a later certificate, has to be noticed
                _logger.exception("%s could not be looked at", ", ".join(map(str, self._paths)))

    async def look(self) -> None:
        """Take over the files' content if they are others than those seen last, or `reload` was called since."""
        asked = self._asked.is_set()
        self._asked.clear()
        # Before they are read: what is written meanwhile has another signature at the next look.
        signature = await asyncio.to_thread(_signature, self._paths)
        self._looks_since += 1
        retry = bool(self._complaint) and self._looks_since >= RETRY_LOOKS
        if signature is not None and signature == self._seen and not asked and not retry:
            return
        first, self._looked, self._looks_since = not self._looked, True, 0
        try:
            told = await self._take()
        except GatewayError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                _logger.error("%s; %s", error, self._instead)
        else:
            if not first or self._complaint:  # they were read at the start too, by whoever watches them
                _logger.info("%s", told)
            self._complaint = ""
        self._seen = signature


def _signature(paths: Sequence[Path]) -> Signature | None:
    try:
        found = [os.stat(path) for path in paths]
    except OSError:
        return None
    return tuple((each.st_mtime_ns, each.st_ino, each.st_size) for each in found)
