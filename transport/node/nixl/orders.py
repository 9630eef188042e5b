"""What the agent and its process with NIXL say to each other: msgpack over a socket pair, each message behind its length."""

import select
import socket

import msgspec

from transport.node.messages import LENGTH_BYTES, NodeError, body_bytes
from transport.table.layout import Region

READ_BYTES = 1 << 20
SEND_SECONDS_MAX = 2.0


class Target(msgspec.Struct, frozen=True, tag="target"):
    """Read into this memory from now on."""

    id: int
    region: Region


class Own(msgspec.Struct, frozen=True, tag="own"):
    """Let others read these regions. `writable`: RDMA devices register no memory that is mapped for reading alone."""

    id: int
    regions: tuple[Region, ...]
    writable: bool = False


class Disown(msgspec.Struct, frozen=True, tag="disown"):
    """What was offered by the Own of this id is not to be read any more; its memory is let go of."""

    id: int


class Know(msgspec.Struct, frozen=True, tag="know"):
    """What `agent`, another process, told of itself and of its memory."""

    id: int
    agent: str
    metadata: bytes


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """A process that is not read from any more."""

    agent: str


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Read `spans`, little-endian uint64 (n, 3): the offset in our target, the address there, bytes."""

    id: int
    agent: str
    spans: bytes


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """NIXL is loaded."""


class Done(msgspec.Struct, frozen=True, tag="done"):
    """An order was carried out: a Read has written all that it will write."""

    id: int
    addresses: tuple[int, ...] = ()
    metadata: bytes = b""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """An order was not carried out. `begun`: its Read may write yet."""

    id: int
    reason: str
    begun: bool = False


Order = Target | Own | Disown | Know | Forget | Read
Said = Order | Ready | Done | Failed
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)


class Channel:
    """One end of the socket pair. Raises NodeError for what is no message, OSError for what befalls the socket."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SEND_SECONDS_MAX)  # whoever takes nothing for so long is stuck
        self._socket = connection
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._data = bytearray()

    def send(self, message: Said) -> None:
        """Send it whole. One thread at a time."""
        body = _encoder.encode(message)
        self._socket.sendall(len(body).to_bytes(LENGTH_BYTES, "big") + body)

    def receive(self, seconds: float | None) -> list[Said] | None:
        """Return what came, after `seconds` at the latest (None: however long it takes); None once the other end is closed."""
        if not self._poll.poll(None if seconds is None else seconds * 1000):
            return []
        data = self._socket.recv(READ_BYTES)
        if not data:
            return None
        self._data += data
        found: list[Said] = []
        while len(self._data) >= LENGTH_BYTES:
            end = LENGTH_BYTES + body_bytes(bytes(self._data[:LENGTH_BYTES]))
            if len(self._data) < end:
                break
            try:
                found.append(_decoder.decode(self._data[LENGTH_BYTES:end]))
            except msgspec.MsgspecError as error:
                raise NodeError(f"a message that says nothing we know: {error}") from error
            del self._data[:end]
        return found

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
