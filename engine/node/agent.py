"""The agent's parts put together: who calls in, whom it follows, and what it writes down for the gateway."""

import asyncio
import contextlib
import logging
import os
import ssl
from collections import Counter
from pathlib import Path

from engine.fleet import FileFleet, FleetError
from engine.joined_fleet import NODES_FILE, NodesTold, write_nodes
from engine.node.fetch_counts import FETCHES_FILE, write_fetches
from engine.node.following import Following
from engine.node.local_fetch import LocalFetches
from engine.node.membership import BEAT_SECONDS, Membership, peer_of
from engine.node.on_demand import OnDemand
from engine.node.settings import NodeSettings, Peer
from engine.node.streams import HELLO_SECONDS, end, finish, pipe, welcome
from engine.node.telling import Teller
from engine.node.threads import in_thread
from transport.errors import TransportError
from transport.node.block_fetcher import BlockFetcher
from transport.node.block_server import BlockServer
from transport.node.decoding import Decoder
from transport.node.fetches import SOCKET
from transport.node.keys import check_address, client_context, server_context
from transport.node.messages import NodeError
from transport.node.nixl.ability import Ability, ability
from transport.node.nixl.node import NixlNode
from transport.node.staging import Staging
from transport.table.directory import TableDirectory

_logger = logging.getLogger(__name__)

HOLD_SECONDS = 0.02
SWEEP_SECONDS = 0.5
"""Between two looks for owners that ended, whose memory is mapped here."""
COUNTS_SECONDS = 1.0
"""How often what was fetched is written down, whether it changed or not: the gateway sees by it that the agent is at work."""
CONNECTIONS_MAX = 1024
"""Connections of other nodes at once, those for blocks aside."""
MEASURED_MAX = 1
"""Nodes whose network is measured at a time: two at once would share it."""


class Agent:
    """Raises NodeError for keys or an address that cannot be used, OSError if the address is taken or memory is short."""

    def __init__(self, settings: NodeSettings) -> None:
        check_address(settings.host, settings.keys_dir)
        self._settings = settings
        self._called_by = server_context(settings.keys_dir)
        self._calls: ssl.SSLContext | None = client_context(settings.keys_dir)
        self._tables = TableDirectory(Path(settings.table_dir), hold_seconds=HOLD_SECONDS)
        self._fleet = FileFleet(Path(settings.run_dir), hold_seconds=HOLD_SECONDS)
        self._staging = Staging(settings.staging_bytes)
        self._nixl = _nixl(settings, self._staging)
        self._following: dict[str, tuple[Following, asyncio.Task[None]]] = {}
        self._measuring = asyncio.Semaphore(MEASURED_MAX)
        self._losses: Counter[str] = Counter()  # of nodes, too, that are not followed any more: they may come back
        self._fetches = LocalFetches(self._tables, self._staging, self._client)
        self._decoder = Decoder()
        self._connections: set[asyncio.Task[None]] = set()
        self._written: NodesTold | None = None
        self.trouble = ""

    async def run(self) -> None:
        """Serve until cancelled."""
        settings = self._settings
        address = (settings.host, settings.port)
        async with contextlib.AsyncExitStack() as stack:
            nixl, blocks_address = self._nixl, (settings.host, settings.port + 1)
            fleet = FileFleet(Path(settings.run_dir), hold_seconds=HOLD_SECONDS)  # of other threads than ours
            blocks = BlockServer(
                Path(settings.table_dir), settings.name, blocks_address, self._called_by, settings.release,
                nixl.owner if isinstance(nixl, NixlNode) else nixl, OnDemand(fleet.snapshot),
                self._decoder,
            )  # fmt: skip
            stack.callback(blocks.close)
            if isinstance(nixl, NixlNode):
                stack.callback(nixl.close)
                nixl.start()
            blocks.start()
            stack.push_async_callback(self._close)
            sweeping = asyncio.create_task(_sweep(blocks))
            stack.callback(sweeping.cancel)
            server = await asyncio.start_server(
                self._called,
                *address,
                ssl=self._called_by,
                ssl_handshake_timeout=None if self._called_by is None else HELLO_SECONDS,
                backlog=64,
            )
            stack.callback(server.close)
            local = Path(settings.table_dir) / SOCKET
            local.unlink(missing_ok=True)
            fetches = await asyncio.start_unix_server(self._fetches.serve, local)
            stack.callback(fetches.close)
            counting = asyncio.create_task(self._write_counts())
            stack.callback(counting.cancel)
            self.follow(settings.peers)
            await self._find()

    def follow(self, peers: tuple[Peer, ...]) -> None:
        """Follow these nodes from now on, and no others; our own name among them is left out."""
        wanted = {peer.name: peer for peer in peers if peer.name != self._settings.name}
        for name in [name for name, (known, _) in self._following.items() if wanted.get(name) != known.peer]:
            self._following.pop(name)[1].cancel()
        for name, peer in wanted.items():
            if name not in self._following:
                following = Following(
                    self._settings, peer, self._calls, self._staging, self._nixl, self._measuring, self._losses, self._write
                )
                self._following[name] = following, asyncio.create_task(following.run(), name=f"following {name}")
        told = self._told()
        if told != self._written:
            self._write()

    async def _find(self) -> None:
        """Follow whom the registry names, for ever; without one, those that we were told."""
        if not self._settings.join:
            await asyncio.Event().wait()
        membership = Membership(self._settings)
        try:
            while True:
                try:
                    found = [peer_of(entry) for entry in await in_thread(None, membership.beat)]
                    trouble = ""
                except NodeError as error:
                    found, trouble = [], str(error)
                if trouble != self.trouble:
                    self.trouble = trouble
                    _logger.warning("no new nodes are found: %s", trouble) if trouble else _logger.info("nodes are found again")
                self.follow((*self._settings.peers, *self._kept(found), *found))
                await asyncio.sleep(BEAT_SECONDS)
        finally:
            try:
                await in_thread(None, membership.leave)
            except NodeError as error:  # the entry ends by itself
                _logger.info("the others are not told that this node ends: %s", error)

    def _kept(self, found: list[Peer]) -> list[Peer]:
        """Return the nodes that are not found but heard: a registry that is away or empty takes nobody from us."""
        named, followed = {peer.name for peer in found}, [known for known, _ in self._following.values()]
        return [known.peer for known in followed if known.client is not None and known.peer.name not in named]

    def _client(self, node: str) -> BlockFetcher | None:
        known = self._following.get(node)
        return known[0].client if known is not None else None

    def _told(self) -> NodesTold:
        return NodesTold(self._settings.name, tuple(known.told() for known, _ in self._following.values()), self.trouble)

    def _write(self) -> None:
        told = self._written = self._told()
        try:
            write_nodes(Path(self._settings.run_dir), told)
        except OSError as error:
            _logger.warning("%s cannot be written: %s", NODES_FILE, error)

    async def _write_counts(self) -> None:
        while True:
            try:
                write_fetches(Path(self._settings.run_dir), self._fetches.counts)
            except OSError as error:
                _logger.warning("%s cannot be written: %s", FETCHES_FILE, error)
                with contextlib.suppress(OSError):
                    os.utime(Path(self._settings.run_dir) / FETCHES_FILE)
            await asyncio.sleep(COUNTS_SECONDS)

    async def _called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody called: find out what for, and do that."""
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= CONNECTIONS_MAX:
            await end(writer)
            return
        self._connections.add(task)
        try:
            hello = await welcome((reader, writer), self._settings.name, self._settings.release)
            if hello.purpose == "changes":
                await Teller(self._tables, self._fleet, self._decoder, writer).run()
            elif hello.purpose == "requests":
                await self._lead(hello.replica, reader, writer)
        except NodeError as error:
            _logger.info("%s: %s", writer.get_extra_info("peername"), error)
        except asyncio.CancelledError:  # by us, as the agent ends: asyncio (3.11) logs it as a defect otherwise
            _logger.debug("the agent ends")
        finally:
            self._connections.discard(task)
            await end(writer)

    async def _lead(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Lead a connection to a replica of this node."""
        try:
            replica = self._fleet.snapshot().find(name)
            if replica is None:
                raise NodeError(f"there is no {name}")
            near = await asyncio.open_unix_connection(replica.socket)
        except (FleetError, OSError) as error:
            raise NodeError(f"{name}: {error}") from error
        try:
            await pipe((reader, writer), near)
        finally:
            await finish(near[1])
            await finish(writer)

    async def _close(self) -> None:
        following = [task for _, task in self._following.values()]
        for task in [*following, *self._connections]:
            task.cancel()
        await asyncio.gather(*following, *self._connections, return_exceptions=True)
        self._fetches.close()
        self._staging.close()
        self._tables.close()
        for name in (NODES_FILE, FETCHES_FILE):
            with contextlib.suppress(OSError):
                (Path(self._settings.run_dir) / name).unlink()


def _nixl(settings: NodeSettings, staging: Staging) -> NixlNode | Ability:
    """Return NIXL on this node, or why there is none."""
    found = ability(settings.transport)
    if not found.version:
        _logger.info("blocks come by TCP alone: %s", found.reason)
        return found
    return NixlNode(settings.name, settings.host, found, staging.region)


async def _sweep(blocks: BlockServer) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            await in_thread(None, blocks.sweep)
        except TransportError as error:
            _logger.info("memory of owners that ended: %s", error)
