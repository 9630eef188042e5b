"""How nodes find each other: each writes its address into a sorted set in Valkey, with the time when it ends, again and again.

A beat asks for that set alone, whatever else the server holds. Times are the server's, so that nodes' clocks may differ.
Nothing that a request needs depends on it. While the server is away, stopped or empty nobody is forgotten that is heard: a node
leaves when it is heard no more *and* is not there any more. Keyspace events are not relied on (they come late, or never): it is
polled.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from math import nan

import msgspec

from engine.frame_tiers.vault.connection import Connection
from engine.frame_tiers.vault.resp import Reply, VaultError, VaultGone, Word, number
from engine.node.settings import NodeSettings, Peer, check_name, read_join
from transport.node.messages import PROTOCOL_MAX, PROTOCOL_MIN, NodeError

NODES_KEY = b"peerkv:nodes"
"""The sorted set: entries by the server's time at which they end, in ms."""
LIVE_MILLISECONDS = 3000
_AHEAD_MILLISECONDS = 2 * LIVE_MILLISECONDS
"""What ends later, though others write while we do, was written before the server's clock was set back."""
BEAT_SECONDS = 1.0
CALL_SECONDS_MAX = 1.0
"""However the server stalls, a beat ends then."""
NODES_MAX = 1024
"""Entries that are read; of more, those that end last."""


class Entry(msgspec.Struct, frozen=True):
    """What a node writes of itself. `epoch` is when its agent began, ns since 1970: it tells two lives apart."""

    name: str
    host: str
    port: int
    epoch: int
    release: str = ""
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


class Membership:
    """One node's. `beat` blocks for CALL_SECONDS_MAX at most, so it is for a thread; `leave` may come while one goes on."""

    def __init__(self, settings: NodeSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._address = read_join(settings.join)
        self._own = Entry(settings.name, settings.host, settings.port, time.time_ns(), settings.release)
        self._written = msgspec.json.encode(self._own)
        self._clock = clock
        self._connection: Connection | None = None
        self._calling = threading.Lock()
        self.others: tuple[Entry, ...] = ()
        """The others at the last beat that succeeded."""

    def beat(self) -> tuple[Entry, ...]:
        """Write ourselves, and return the others that are there. Raises NodeError if that cannot be done now.

        That is so, too, if another node has our name: the one that came later gives way.
        """
        with self._calling:
            return self._beat()

    def _beat(self) -> tuple[Entry, ...]:
        deadline = self._clock() + CALL_SECONDS_MAX
        try:
            if self._connection is None:
                self._connection = Connection(self._address, self._address.context(), deadline)
            found, now = self._read(self._connection, deadline)
            for entry in found:
                ours = (entry.host, entry.port) == (self._own.host, self._own.port)
                if entry.name == self._own.name and not ours and entry.epoch < self._own.epoch:
                    raise NodeError(f"{entry.host}:{entry.port} is called {entry.name} already: give this node another name")
            self._write(self._connection, now, deadline)
        except (VaultGone, OSError) as error:
            self.close()
            raise NodeError(f"{self._address.shown}: {error}") from error
        self.others = tuple(entry for entry in found if entry.name != self._own.name)
        return self.others

    def leave(self) -> None:
        """Say that we end, if the server can be reached: otherwise our entry ends by itself."""
        with self._calling:
            if self._connection is not None:
                with contextlib.suppress(VaultGone):
                    self._connection.call([[b"ZREM", NODES_KEY, self._written]], self._clock() + CALL_SECONDS_MAX)
                self.close()

    def close(self) -> None:
        """Close the connection; the next beat makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _read(self, connection: Connection, deadline: float) -> tuple[list[Entry], int]:
        """Return the entries that have not ended, one for each name, and the server's time, ms."""
        last: list[Word] = [b"ZREVRANGEBYSCORE", NODES_KEY, b"+inf", b"-inf", b"WITHSCORES", b"LIMIT", b"0", b"%d" % NODES_MAX]
        match self._answered(connection, [[b"TIME"], last], deadline):
            case [[bytes() as seconds, bytes() as microseconds], list() as told]:
                now = number(seconds) * 1000 + number(microseconds) // 1000
            case replies:
                raise NodeError(f"{self._address.shown}: {replies!r:.200}")
        found: dict[str, Entry] = {}
        for value, ends in zip(told[::2], told[1::2], strict=False):
            entry = _entry(value)
            if entry is not None and now < _milliseconds(ends) <= now + _AHEAD_MILLISECONDS:
                found[entry.name] = min(entry, found.get(entry.name, entry), key=lambda each: each.epoch)
        return list(found.values()), now

    def _write(self, connection: Connection, now: int, deadline: float) -> None:
        """Write ourselves, and remove what has ended; the set ends with the last of the nodes."""
        commands: list[list[Word]] = [
            [b"ZREMRANGEBYSCORE", NODES_KEY, b"-inf", b"%d" % now],
            [b"ZREMRANGEBYSCORE", NODES_KEY, b"(%d" % (now + _AHEAD_MILLISECONDS), b"+inf"],
            [b"ZADD", NODES_KEY, b"%d" % (now + LIVE_MILLISECONDS), self._written],
            [b"PEXPIRE", NODES_KEY, b"%d" % LIVE_MILLISECONDS],
        ]
        self._answered(connection, commands, deadline)

    def _answered(self, connection: Connection, commands: list[list[Word]], deadline: float) -> list[Reply]:
        """Return what is answered. Raises NodeError for a command that is refused."""
        replies = connection.call(commands, deadline)
        for reply in replies:
            if isinstance(reply, VaultError):
                raise NodeError(f"{self._address.shown}: {reply}")
        return replies


def peer_of(entry: Entry) -> Peer:
    """Return where a node is called."""
    return Peer(entry.name, entry.host, entry.port)


def _milliseconds(score: object) -> float:
    try:
        return float(score) if isinstance(score, bytes) else nan
    except ValueError:
        return nan


def _entry(value: object) -> Entry | None:
    """Return what a node wrote of itself; None for what is no node's: it may be anybody's server."""
    try:
        entry = msgspec.json.decode(value, type=Entry) if isinstance(value, bytes) else None
        if entry is None or not 0 < entry.port < 65535:
            return None
        check_name(entry.name)
    except (msgspec.MsgspecError, NodeError):
        return None
    return entry
