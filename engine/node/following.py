"""Follows one other node: mirrors its tables here, and leads requests to its replicas.

As soon as the node is not heard its mirrors end, so that nobody here counts on it; when it is heard again, it tells everything
anew.
"""

import asyncio
import contextlib
import logging
import os
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from engine.joined_fleet import NodeTold, WayTold
from engine.node.settings import NodeSettings, Peer
from engine.node.streams import SILENCE_SECONDS, Stream, call, end, finish, pipe, receive
from engine.node.threads import in_thread
from engine.node.ways import Ways
from transport.node.block_client import BlockClient
from transport.node.messages import PROBE_BLOCK_BYTES, PROBE_BLOCKS, FleetTold, Hello, NodeError
from transport.node.mirrors import Mirrors
from transport.node.names import HOLDER_NAME
from transport.node.nixl.ability import Ability
from transport.node.nixl.node import NixlNode
from transport.node.staging import Staging

_logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""Between two looks whether the way that was chosen failed."""
MEASURE_SECONDS, MEASURE_SECONDS_MAX = 1.0, 600.0
MEASURED_SECONDS_MAX = 900.0
"""What was measured may be so old: it may have been while others used the network, and nobody imports what seems too slow."""
PAUSE_SECONDS, PAUSE_SECONDS_MAX = 0.25, 5.0
REPLICAS_MAX = 64
"""Replicas of one node that requests are led to."""


class Following:
    """Keeps up one connection to `peer` until it is cancelled; `changed` is called when there is something to tell.

    `losses` counts by name how often a node was heard and then no more.
    """

    def __init__(
        self,
        settings: NodeSettings,
        peer: Peer,
        context: ssl.SSLContext | None,
        staging: Staging,
        nixl: NixlNode | Ability,
        measuring: asyncio.Semaphore,
        losses: Counter[str],
        changed: Callable[[], None],
    ) -> None:
        self.peer = peer
        self.client: Ways | None = None
        self._settings = settings
        self._context = context
        self._staging = staging
        self._nixl = nixl
        self._measuring = measuring
        self._changed = changed
        self._fleet: FleetTold | None = None
        self._trouble = "not called yet"
        self._losses = losses
        self._tcp_bytes_per_second = 0.0
        self._doors: dict[str, tuple[str, asyncio.Server]] = {}

    def told(self) -> NodeTold:
        """What there is to tell of the node now."""
        sockets = {name: path for name, (path, _) in self._doors.items()}
        way = self.client.told if self.client is not None else WayTold()
        return NodeTold(
            self.peer.name, self.peer.address, self._fleet, sockets, self._trouble, way, self._losses[self.peer.name]
        )

    async def run(self) -> None:
        """Call the node again whenever it is not heard any more."""
        pause = 0.0
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._follow()
                except NodeError as error:
                    self._lost(str(error))
                pause = next_pause(pause, time.monotonic() - began, PAUSE_SECONDS, PAUSE_SECONDS_MAX)
                await asyncio.sleep(pause)
        finally:
            self._lost("this node ends")
            await self._close_doors(set())

    async def _follow(self) -> None:
        settings, peer = self._settings, self.peer
        reader, writer = await call(peer, self._context, Hello(settings.name, "changes", release=settings.release))
        table_dir, region = Path(settings.table_dir), self._staging.region
        mirrors = Mirrors(table_dir, peer.name, settings.name, os.getpid(), region, time.monotonic_ns)
        ways = self.client = self._ways()
        choosing = asyncio.create_task(self._choose(ways), name=f"how blocks come from {peer.name}")
        try:
            _logger.info("%s is heard", peer.name)
            while True:
                message = await receive(reader, SILENCE_SECONDS)
                if isinstance(message, FleetTold):
                    await self._take(message)
                else:
                    mirrors.hear(message)
        finally:
            choosing.cancel()
            mirrors.close()
            await end(writer)

    def _ways(self) -> Ways:
        settings, peer, nixl = self._settings, self.peer, self._nixl
        found = nixl.found if isinstance(nixl, NixlNode) else nixl
        address, loop = (peer.host, peer.port + 1), asyncio.get_running_loop()
        tcp = BlockClient(peer.name, address, self._context, settings.name, settings.release, found.version)
        reading = nixl.client(tcp) if isinstance(nixl, NixlNode) else None
        return Ways(
            peer.name, tcp, reading, found, settings.transport, lambda: tell(loop, self._changed), self._tcp_bytes_per_second
        )

    async def _choose(self, ways: Ways) -> None:
        """Measure until a way is chosen, and again after it failed: later each time, unless it had held for long; and now and
        then."""
        pause = 0.0
        if not ways.settled:
            await self._measure(ways)
        while True:
            began = time.monotonic()
            while ways.settled and time.monotonic() - began < MEASURED_SECONDS_MAX:  # noqa: ASYNC110 - what fails is noticed by threads
                await asyncio.sleep(LOOK_SECONDS)
            pause = next_pause(pause, time.monotonic() - began, MEASURE_SECONDS, MEASURE_SECONDS_MAX)
            await asyncio.sleep(pause)
            await self._measure(ways)

    async def _measure(self, ways: Ways) -> None:
        async with self._measuring:
            piece = self._staging.take(
                max(1, min(PROBE_BLOCKS, self._staging.region.size // PROBE_BLOCK_BYTES // 4)), PROBE_BLOCK_BYTES
            )
            if piece is None:
                return
            measuring = asyncio.ensure_future(in_thread(None, ways.choose, piece))
            measuring.add_done_callback(lambda _: self._staging.give_back(piece))  # even if nobody waits for it any more
            try:
                await asyncio.shield(measuring)
            except NodeError as error:
                _logger.info("how fast blocks of %s come is not measured: %s", self.peer.name, error)

    def _lost(self, why: str) -> None:
        if self._fleet is not None or why != self._trouble:
            _logger.warning("%s is not heard: %s", self.peer.name, why)
        client, self.client = self.client, None
        if client is not None:
            self._losses[self.peer.name] += 1
            self._tcp_bytes_per_second = client.told.tcp_bytes_per_second
            client.close()
        self._fleet, self._trouble = None, why
        self._changed()

    async def _take(self, fleet: FleetTold) -> None:
        """Have a socket here for each replica there."""
        if len(fleet.replicas) > REPLICAS_MAX:
            raise NodeError(f"it tells of {len(fleet.replicas)} replicas")
        wanted = {replica.name for replica in fleet.replicas}
        await self._close_doors(wanted)
        for name in wanted - self._doors.keys():
            if not HOLDER_NAME.fullmatch(name):
                raise NodeError(f"it tells of a replica called {name!r}")
            path = str(Path(self._settings.run_dir) / f"{self.peer.name}.{name}.sock")
            try:
                _remove(path)
                self._doors[name] = path, await asyncio.start_unix_server(self._lead(name), path)
            except OSError as error:
                raise NodeError(f"no socket for {name}: {error}") from error
        self._fleet, self._trouble = fleet, ""
        self._changed()

    def _lead(self, replica: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        """Return what leads a connection to a replica of the node."""

        async def led(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far: Stream | None = None
            try:
                hello = Hello(self._settings.name, "requests", release=self._settings.release, replica=replica)
                far = await call(self.peer, self._context, hello)
                await pipe((reader, writer), far)
            except NodeError as error:
                _logger.info("no way to %s of %s: %s", replica, self.peer.name, error)
            except asyncio.CancelledError:  # as the agent ends: asyncio (3.11) logs it as a defect otherwise
                _logger.debug("the agent ends")
            finally:
                if far is not None:
                    await finish(far[1])
                await finish(writer)

        return led

    async def _close_doors(self, kept: set[str]) -> None:
        for name in self._doors.keys() - kept:
            path, server = self._doors.pop(name)
            server.close()
            with contextlib.suppress(OSError):
                _remove(path)


def next_pause(pause: float, held: float, first: float, longest: float) -> float:
    """Return how long to wait for the next try after `pause`: twice as long, unless what was tried `held` for `longest`."""
    return first if held > longest else min(max(first, 2 * pause), longest)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def tell(loop: asyncio.AbstractEventLoop, changed: Callable[[], None]) -> None:
    """Have `changed` called by the loop's thread, if there is still one."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(changed)
