"""What agents say to each other: frames of msgpack, each behind its length in 4 bytes, both bounded. No pickle, ever.

A connection begins with a Hello, answered by a Welcome or a Refused. A receiver ignores fields that it does not know, and has
defaults for those that a sender does not: two releases that share a protocol version understand each other.
"""

import struct
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from transport.errors import TransportError
from transport.groups import Group
from transport.table.deliveries import Delivery

PROTOCOL_MIN, PROTOCOL_MAX = 1, 1
"""The versions of the protocol that this release speaks."""
FRAME_BYTES_MAX = 32 << 20
BLOCKS_ASKED_MAX = 1 << 16
LAYERS_MAX = 4096
METADATA_BYTES_MAX = 1 << 20
PROBE, PROBE_BLOCKS, PROBE_BLOCK_BYTES = "", 16, 1 << 20
_LENGTH = struct.Struct("!I")
LENGTH_BYTES = _LENGTH.size

Name = Annotated[str, Meta(max_length=200)]
Words = Annotated[str, Meta(max_length=4000)]
Bytes = Annotated[bytes, Meta(max_length=FRAME_BYTES_MAX)]
OwnerKey = tuple[str, int, int]
"""Whose memory is asked for: a table's name and epoch, and a rank."""


Loss = Literal["changed", "failed", "silent", "slow", "no_room", "not_heard"]
"""Why blocks that were asked for did not come: they were not what was looked up any more, the node or the connection failed,
nothing came for seconds, it took too long as a whole, this node had no memory for them, or the node is not heard any more."""


class NodeError(TransportError):
    """Another node cannot be used: it is unreachable, refuses us, or says what we do not understand."""

    def __init__(self, reason: str, loss: Loss = "failed") -> None:
        super().__init__(reason)
        self.loss = loss


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first frame of a connection: who calls, what for, and the protocol versions it speaks. `replica` is for requests.

    `nixl` is the version of NIXL that it can read blocks with, for a connection for blocks; "" if it cannot.
    """

    node: Name
    purpose: Literal["changes", "requests", "blocks"]
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX
    release: Name = ""
    replica: Name = ""
    nixl: Name = ""


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The call is accepted, in this version of the protocol.

    `nixl` is the version of NIXL by which the caller can read our blocks; "" if it cannot, for the reason in `without_nixl`.
    """

    node: Name
    protocol: int
    release: Name = ""
    nixl: Name = ""
    without_nixl: Words = "its release knows nothing of NIXL"


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The call is not accepted, and why."""

    reason: Words


class ReplicaTold(msgspec.Struct, frozen=True):
    """A replica of the node."""

    name: Name
    state: Name
    restarts: int = 0
    reason: Words = ""
    device: Name = ""


class FleetTold(msgspec.Struct, frozen=True, tag="fleet"):
    """The node's replicas and what they serve."""

    model: Words = ""
    served_model_name: Words = ""
    vllm_args: tuple[Words, ...] = ()
    replicas: Annotated[tuple[ReplicaTold, ...], Meta(max_length=1024)] = ()


class LayerTold(msgspec.Struct, frozen=True, array_like=True):
    """The bytes that a block takes in a layer, and the layer's group, in the order of the blocks' bytes."""

    bytes: int
    group: int = 0


class MemoryTold(msgspec.Struct, frozen=True):
    """A rank's KV memory, as far as it concerns others: they ask for its blocks."""

    rank: int
    layers: tuple[LayerTold, ...]


class TableOpened(msgspec.Struct, frozen=True, tag="opened"):
    """A table appeared, or changed its epoch: what it held before counts no more."""

    name: Name
    epoch: int
    block_size: int
    blocks: int
    hash_name: Name
    transport: Name
    status: Words
    fingerprint: dict[str, str]
    groups: tuple[Group, ...] = ()
    memories: tuple[MemoryTold, ...] = ()


class TableChanged(msgspec.Struct, frozen=True, tag="changed"):
    """Blocks of a table that changed: ids uint32, states uint64, keys of 16 bytes, little-endian. `sequence` counts from 1."""

    name: Name
    sequence: int
    ids: Bytes
    states: Bytes
    keys: Bytes


class EngineTold(msgspec.Struct, frozen=True, tag="engine"):
    """What a table says of its engine: load and counters by name, the time of its last step, the tags of waiting requests."""

    name: Name
    heartbeat_ns: int = 0
    load: dict[str, int] = {}
    counters: dict[str, int] = {}
    waiting: Annotated[tuple[int, ...], Meta(max_length=4096)] = ()


class Delivered(msgspec.Struct, frozen=True, tag="delivered"):
    """What an engine delivered, oldest first."""

    name: Name
    deliveries: Annotated[tuple[Delivery, ...], Meta(max_length=4096)]


class TableClosed(msgspec.Struct, frozen=True, tag="closed"):
    """A table is gone, and its owner with it."""

    name: Name


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The sender is alive; `now_ns` is its CLOCK_MONOTONIC. It begins each round of changes."""

    now_ns: int


class BlocksAsked(msgspec.Struct, frozen=True, tag="asked"):
    """Send these blocks of a table in this epoch, as one rank holds them: ids uint32, states uint64, little-endian.

    `counts` tells how many are of each KV cache group, in the order of the groups; empty if there is one. The table PROBE is
    for measuring: it has PROBE_BLOCKS blocks of PROBE_BLOCK_BYTES each, all zeros, which are good in any state.
    """

    name: Name
    epoch: int
    rank: int
    ids: Bytes
    states: Bytes
    counts: tuple[int, ...] = ()


class BlocksSent(msgspec.Struct, frozen=True, tag="sent"):
    """So many blocks of `bytes` each follow this frame. `good` has a byte for each: 1 if its state was the same after the copy.

    Where it is 0 the bytes that follow are zeros. `last`: there are no more; `reason` says why blocks are missing.
    """

    good: Bytes
    bytes: int
    last: bool = False
    reason: Words = ""


class MemoryAsked(msgspec.Struct, frozen=True, tag="memory"):
    """Tell where a rank's blocks of a table lie, so that we can read them by NIXL."""

    name: Name
    epoch: int
    rank: int


class Placed(msgspec.Struct, frozen=True, array_like=True):
    """A layer's blocks in the memory of the process that metadata is of: block b is `bytes` bytes at `address + b * stride`."""

    address: int
    stride: int
    bytes: int
    group: int = 0


class MemoryOffered(msgspec.Struct, frozen=True, tag="offered"):
    """Where blocks lie, and NIXL's metadata of the process that has them; without layers, for the reason, it cannot be read.

    `offer` is the number of this offer, for the check; `agent` is that process's name among agents of NIXL.
    """

    offer: int = 0
    agent: Name = ""
    layers: Annotated[tuple[Placed, ...], Meta(max_length=LAYERS_MAX)] = ()
    metadata: Annotated[bytes, Meta(max_length=METADATA_BYTES_MAX)] = b""
    reason: Words = ""


class CheckAsked(msgspec.Struct, frozen=True, tag="check"):
    """These blocks were read from what was offered: say which of them are what was looked up."""

    offer: int
    asked: BlocksAsked


class Checked(msgspec.Struct, frozen=True, tag="checked"):
    """`good` has a byte for each block: 1 if its state is still the same. Memory with checksums adds them, and the keys.

    16 bytes of each for each block: the checksum is that of the block's bytes followed by its key.
    """

    good: Bytes
    sums: Bytes = b""
    keys: Bytes = b""
    reason: Words = ""


class Staged(msgspec.Struct, frozen=True, tag="staged"):
    """An agent to an engine of its node: the blocks lie in the slots of its memory from `first` on; `good` has a byte for each.

    They lie there until the engine closes this connection.
    """

    first: int
    good: Bytes
    reason: Words = ""


Message = (
    Hello | Welcome | Refused | FleetTold | TableOpened | TableChanged | EngineTold | Delivered | TableClosed | Beat
    | BlocksAsked | BlocksSent | MemoryAsked | MemoryOffered | CheckAsked | Checked | Staged
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a frame. Raises NodeError if it would be too long."""
    body = _encoder.encode(message)
    if len(body) > FRAME_BYTES_MAX:
        raise NodeError(f"a frame of {len(body)} bytes")
    return _LENGTH.pack(len(body)) + body


def body_bytes(head: bytes) -> int:
    """Return how long the body of a frame is whose first LENGTH_BYTES are `head`. Raises NodeError if it is too long."""
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= FRAME_BYTES_MAX:
        raise NodeError(f"a frame that says it has {length} bytes")
    return int(length)


def decode(body: bytes | bytearray | memoryview) -> Message:
    """Return what a frame's body says. Raises NodeError for anything else."""
    try:
        return _decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise NodeError(f"a frame that says nothing we know: {error}") from error


def agreed(hello: Hello) -> int:
    """Return the newest protocol version that both speak. Raises NodeError, and says which each does, if there is none."""
    version = min(hello.protocol_max, PROTOCOL_MAX)
    if version < max(hello.protocol_min, PROTOCOL_MIN):
        raise NodeError(
            f"{hello.node or 'it'} (peerkv {hello.release or 'of an unknown release'}) speaks versions {hello.protocol_min} to "
            f"{hello.protocol_max} of the nodes' protocol, this node {PROTOCOL_MIN} to {PROTOCOL_MAX}: update the older one"
        )
    return version
