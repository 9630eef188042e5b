"""Serves blocks of this node's tables to other nodes: a thread for each connection, plain sockets, TLS where there are keys.

It belongs to the node's agent and not to an engine: an engine that is stopped or busy serves as fast as an idle one.
"""

import logging
import socket
import ssl
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from transport.errors import MemoryUnreachable, TransportError
from transport.node.block_copy import Chunk, OwnerMemory, checked, chunks, questioned
from transport.node.decoding import Decoder
from transport.node.messages import (
    PROBE,
    PROBE_BLOCK_BYTES,
    PROBE_BLOCKS,
    BlocksAsked,
    BlocksSent,
    CheckAsked,
    Checked,
    MemoryAsked,
    MemoryOffered,
    NodeError,
    OwnerKey,
    encode,
)
from transport.node.names import node_of
from transport.node.nixl.ability import NO_NIXL, Ability
from transport.node.readable import keeps_for, readable
from transport.node.sockets import Wire, break_off, welcome
from transport.node.stored_blocks import StoredBlocks, Storing
from transport.node.threads import start_thread
from transport.table.directory import TableDirectory
from transport.table.layout import Memory
from transport.table.reader import TableReader

_logger = logging.getLogger(__name__)

CONNECTIONS_MAX = 256
IDLE_SECONDS_MAX = 300.0
HELLO_SECONDS_MAX = 5.0
CLOSE_SECONDS_MAX = 2.0
HOLD_SECONDS = 0.02
SHORT_SECONDS = 1.0
"""Between two tries to accept where descriptors or threads are short: whoever calls waits as long, and the log has a line."""


class Offers(Protocol):
    """What lets others read memory without our help: NIXL."""

    def ability(self) -> Ability:
        """Return what can be done now."""

    def offer(self, key: OwnerKey, memory: Memory | None) -> MemoryOffered:
        """Return where a table's memory lies for others, or that of PROBE. Raises NodeError, TransportError."""

    def holds(self, key: OwnerKey, offer: int) -> bool:
        """Tell whether what was offered under that number can still be read as it was offered."""

    def drop(self, keys: Collection[OwnerKey]) -> None:
        """Let go of these owners' memory."""


class BlockServer:
    """Listens from `start` to `close`. `offers` is how blocks are read past it, or why they are not; `storing` brings those of
    engines whose memory cannot be read into host memory, where there is any. `decoder` is somebody else's too; None: its own.

    Raises OSError if the address cannot be had.
    """

    def __init__(
        self,
        table_dir: Path,
        here: str,
        address: tuple[str, int],
        context: ssl.SSLContext | None,
        release: str,
        offers: Offers | Ability = NO_NIXL,
        storing: Storing | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self._offers = None if isinstance(offers, Ability) else offers
        self._found = offers if isinstance(offers, Ability) else NO_NIXL
        self._storing = storing
        self._decoder = decoder or Decoder()
        self._tables = TableDirectory(table_dir, hold_seconds=HOLD_SECONDS)
        self._memories: dict[OwnerKey, OwnerMemory] = {}
        self._here = here
        self._context = context
        self._release = release
        self._listener = socket.create_server(address, backlog=64)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        self._accepting = threading.Thread(target=self._accept, name="peerkv-blocks", daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Accept connections from now on."""
        self._accepting.start()

    def close(self) -> None:
        """End every connection, and listen no more."""
        with self._lock:
            self._closed.set()
            for each in (self._listener, *self._open):  # whoever waits in a call on it is woken
                break_off(each)
        self._accepting.join(CLOSE_SECONDS_MAX)
        self._listener.close()
        with self._lock:
            self._tables.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                _logger.warning("accepting: %s", error)
                self._closed.wait(SHORT_SECONDS)
                continue
            with self._lock:
                if self._closed.is_set() or len(self._open) >= CONNECTIONS_MAX:
                    connection.close()
                    continue
                self._open.add(connection)
            try:
                start_thread("peerkv-blocks", self._serve, connection, address)
            except NodeError as error:  # whoever called tries again
                _logger.warning("the connection of %s: %s", address, error)
                with self._lock:
                    self._open.discard(connection)
                connection.close()
                self._closed.wait(SHORT_SECONDS)

    def _serve(self, connection: socket.socket, address: object) -> None:
        spoken = connection
        try:
            connection.settimeout(HELLO_SECONDS_MAX)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                spoken = self._context.wrap_socket(connection, server_side=True)
                with self._lock:
                    self._open.discard(connection)
                    self._open.add(spoken)
            nixl = self._offers.ability() if self._offers is not None else self._found
            wire, hello = welcome(spoken, self._here, self._release, nixl)
            if hello.purpose != "blocks":
                raise NodeError("this port is for blocks")
            while not self._closed.is_set():
                self._answer(wire)
        except (OSError, NodeError) as error:
            _logger.debug("the connection of %s: %s", address, error)
        finally:
            with self._lock:
                self._open.discard(connection)
                self._open.discard(spoken)
            spoken.close()

    def _answer(self, wire: Wire) -> None:
        wire.wait(IDLE_SECONDS_MAX)
        asked = wire.receive()
        wire.wait(None)
        match asked:
            case BlocksAsked():
                self._send(wire, asked)
            case MemoryAsked():
                wire.send(encode(self._offer(asked)))
            case CheckAsked():
                wire.send(encode(self._check(asked)))
            case _:
                raise NodeError("it asks for no blocks")

    def _send(self, wire: Wire, asked: BlocksAsked) -> None:
        if asked.name == PROBE:
            for _ in range(len(questioned(asked, PROBE_BLOCKS)[0])):
                wire.send(encode(BlocksSent(b"\1", PROBE_BLOCK_BYTES)), bytes(PROBE_BLOCK_BYTES))
            wire.send(encode(BlocksSent(b"", 0, last=True)))
            return
        try:
            found = self._chunks(asked)
        except (NodeError, MemoryUnreachable) as error:
            wire.send(encode(BlocksSent(b"", 0, last=True, reason=str(error))))
            return
        for chunk in found:
            size = chunk.content.shape[1]
            wire.send(encode(BlocksSent(chunk.good.tobytes(), size)), chunk.content.data.cast("B"))
        wire.send(encode(BlocksSent(b"", 0, last=True)))

    def _chunks(self, asked: BlocksAsked) -> Iterator[Chunk]:
        storing = self._storing
        with self._lock:
            owner = self._reader(asked)
            if storing is None or readable(owner):
                return chunks(owner, self._memory(owner, asked.rank), asked)
            alike = [reader for reader in self._tables.tables().values() if keeps_for(reader, owner)]
            tiers = [(reader, self._memory(reader, asked.rank)) for reader in alike]
        stored = StoredBlocks(owner, tiers, asked)
        storing.store(asked.name, stored.missing)
        return stored.chunks()

    def _offer(self, asked: MemoryAsked) -> MemoryOffered:
        try:
            if self._offers is None:
                raise NodeError("nothing is offered by NIXL")
            key = (asked.name, asked.epoch, asked.rank)
            memory = None if asked.name == PROBE else self._find(asked)[1].memory
            try:
                return self._offers.offer(key, memory)
            finally:
                with self._lock:
                    swept = memory is not None and key not in self._memories
                if swept:  # its owner ended meanwhile, and nobody would drop it any more
                    self._offers.drop([key])
        except TransportError as error:
            return MemoryOffered(reason=str(error))

    def _check(self, question: CheckAsked) -> Checked:
        asked = question.asked
        try:
            if self._offers is None or not self._offers.holds((asked.name, asked.epoch, asked.rank), question.offer):
                raise NodeError(f"the memory of {asked.name} is offered no more")
            if asked.name == PROBE:
                return Checked(b"\1" * len(questioned(asked, PROBE_BLOCKS)[0]))
            reader, memory = self._find(asked)
        except TransportError as error:
            return Checked(b"", reason=str(error))
        return checked(reader, memory, asked)

    def _find(self, asked: BlocksAsked | MemoryAsked) -> tuple[TableReader, OwnerMemory]:
        with self._lock:
            reader = self._reader(asked)
            return reader, self._memory(reader, asked.rank)

    def _reader(self, asked: BlocksAsked | MemoryAsked) -> TableReader:
        tables: Mapping[str, TableReader] = self._tables.tables()
        reader = tables.get(asked.name)
        if reader is None or node_of(asked.name) or reader.epoch != asked.epoch:
            raise NodeError(f"{asked.name} is gone")
        return reader

    def _memory(self, reader: TableReader, rank: int) -> OwnerMemory:
        key = (reader.name, reader.epoch, rank)
        if key not in self._memories:
            self._memories[key] = OwnerMemory(reader, rank, self._decoder)
        return self._memories[key]

    def sweep(self) -> None:
        """Let go of the memory of owners that ended: it stays allocated for as long as it is mapped here."""
        with self._lock:
            if self._closed.is_set():
                return
            tables = self._tables.tables()
            if any(memory.coded is not None for reader in tables.values() for memory in reader.memories):
                self._decoder.prepare()  # before somebody waits for it
            dead = [key for key in self._memories if (t := tables.get(key[0])) is None or t.epoch != key[1]]
            for key in dead:
                del self._memories[key]
        if self._offers is not None and dead:
            self._offers.drop(dead)
