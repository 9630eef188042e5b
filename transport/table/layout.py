"""The bytes of a block table, agreed between its one writer and its readers.

| offset | what |
|---|---|
| 0 | fixed header: magic, version, sizes, epoch, flags (`HEADER`) |
| 64 | heartbeat: CLOCK_MONOTONIC nanoseconds of the owner's last step, uint64 |
| 72 | number of valid blocks, uint64 |
| 80 | number of the newest delivery record, uint64 |
| 88 | number of changes noted in the journal, uint64 |
| 128 | load, uint64 each, in the order of `LOAD` |
| 256 | counters, uint64 each, in the order of `COUNTERS` |
| 1024 | tags of the requests that wait for their first step, uint64 each, 0 where there is none (`waiting_area.py`) |
| 4096 | description: a JSON object (`Description`), padded |
| then | states: uint64 per block; odd while the content is not valid, even and never repeated while it is (`quality.py`) |
| then | keys: 16 bytes per block |
| then | index: `WAYS` uint32 per bucket, each a block id + 1 or 0; a hint, the block's own key decides |
| then | peers: what was imported from each (`peer_area.py`) |
| then | deliveries: the ring of the last records (`delivery_ring.py`) |
| then | journal: ids of the blocks that changed last, uint32 each (`journal.py`) |

All integers are little-endian, all arrays start at a multiple of 4096.
"""

import mmap
import struct
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from transport.groups import Group
from transport.table import delivery_ring, journal, peer_area
from transport.table.deliveries import EngineLoad

SUFFIX = ".table"
MAGIC = b"PEERKV\x00\x01"
VERSION = 8
PAGE_BYTES = 4096
WAYS = 8
DESCRIPTION_BYTES_MAX = 4 << 20
BLOCKS_MAX = 1 << 28
CHECKSUM_BYTES = 16
HEARTBEAT_OFFSET = 64
VALID_OFFSET = 72
NEWEST_OFFSET = 80
CHANGES_OFFSET = 88
LOAD_OFFSET = 128
LOAD = tuple(field.name for field in fields(EngineLoad))
COUNTERS_OFFSET = 256
COUNTERS = (
    "requests",
    "prompt_tokens",
    "local_tokens",
    "computed_tokens",
    "peer_tokens_shared_memory",
    "peer_tokens_cuda_ipc",
    "imports",
    "import_blocks",
    "import_bytes",
    "import_nanoseconds",
    "check_failures",
    "fallbacks",
    "published_blocks",
    "evictions",
    "peers_incompatible",
    "table_errors",
    "pins",
    "pins_refused",
    "hints_malformed",
    "tier_tokens_host_memory",
    "tier_dropped_blocks",
    "tier_tokens_disk",
    "tier_tokens_vault",
    "tier_ahead_blocks",
)
"""Counted by the owner's scheduler since its epoch began. A prompt's tokens are counted once, when it is first scheduled:
prompt_tokens = local_tokens + peer_tokens_* + tier_tokens_* + computed_tokens. `check_failures` are blocks that changed under a
copy or do not match their checksum, `fallbacks` requests whose import failed and that computed instead, `evictions` published
blocks that were reallocated, `pins` prefixes that were pinned, `hints_malformed` fields of the gateway's hints that were
ignored. In a tier's own table `published_blocks` were stored, `evictions` gave their room to others, `tier_dropped_blocks`
were lost because too many were being stored, and `tier_ahead_blocks` began to be stored before they were reallocated."""

HEADER = struct.Struct("<8sIIQIIIII")  # magic, version, page, epoch, block size, blocks, buckets, ways, description bytes


class Region(msgspec.Struct, frozen=True):
    """One allocation that holds KV: the transport opens it by `handle`; `size` is in bytes."""

    handle: str
    size: int


class Layer(msgspec.Struct, frozen=True):
    """Where a layer's blocks lie: block b is `bytes` bytes at `offset + b * stride` of region `region`.

    Layers of different groups lie over each other: a block is of one group at a time, and only that group's layers hold it.
    """

    region: int
    offset: int
    stride: int
    bytes: int
    group: int = 0


class Checksums(msgspec.Struct, frozen=True):
    """Where checksums lie: that of block b is CHECKSUM_BYTES bytes at `offset + b * stride` of region `region`.

    It is the xxh3_128 of the block, whose layers lie side by side in their order, followed by its key.
    """

    region: int
    offset: int
    stride: int


class GroupBytes(msgspec.Struct, frozen=True):
    """Where it lies of which KV cache group blocks are: of block b the byte at `offset + b * stride` of region `region`, the
    group's number and 1. It is true while a block is on offer."""

    region: int
    offset: int
    stride: int


SlotCodec = Literal["int8", "rot4", "rot3"]


class Coded(msgspec.Struct, frozen=True):
    """Where blocks lie that are coded by `codec`, those whose state says IN_CODE: block b is `bytes` bytes at `offset + b *
    stride` of region `region`, as transport/frames/slot_codes.py has them.

    `shape` is that of a block, packed, in hex digits. The xxh3_128 of the coded block, followed by its key, lies `checksum`
    bytes behind its beginning; -1: nowhere. A block that is not coded takes the room of `whole` numbers from its own on, which
    is a multiple of that. `first`: a sequence's first block may be coded too.
    """

    region: int
    offset: int
    stride: int
    bytes: int
    shape: str
    checksum: int = -1
    codec: SlotCodec = "int8"
    whole: int = 2
    first: bool = True


class Memory(msgspec.Struct, frozen=True):
    """The KV memory of one tensor-parallel rank, opened as `transport` says, which of a tier's on GPUs is not the table's.

    A tier's on the CPU has `checksums`, an engine's none. One of a tier without them has `group_bytes` where groups' blocks are
    of several sizes. Only a tier's may have blocks that are `coded`.
    """

    rank: int
    transport: str
    regions: tuple[Region, ...]
    layers: tuple[Layer, ...]
    checksums: Checksums | None = None
    coded: Coded | None = None
    group_bytes: GroupBytes | None = None


class Description(msgspec.Struct, frozen=True):
    """What a table says about its owner. `status` is "ok" or the reason why this replica does not exchange blocks.

    `groups` are the model's KV cache groups, those that need all blocks first; none where they are not known.
    """

    replica: str
    pid: int
    hash_name: str
    transport: str
    status: str
    fingerprint: dict[str, str]
    memories: tuple[Memory, ...]
    groups: tuple[Group, ...] = ()


def align(size: int) -> int:
    """Round `size` up to a whole number of pages."""
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def bucket_count(blocks: int) -> int:
    """Return a power of two such that the index is at most a sixteenth full.

    Keys spread evenly, so a bucket holds half a block on average, and more than WAYS once in 1e9. At a quarter, a full table of
    57,000 blocks lost three that way, and with each the rest of a prefix (seen on a GPU).
    """
    return 1 << max(0, (-(-blocks * 16 // WAYS) - 1).bit_length())


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets in bytes of a table's parts, computed from its sizes."""

    blocks: int
    buckets: int
    description_bytes: int

    @property
    def states(self) -> int:
        return PAGE_BYTES + align(self.description_bytes)

    @property
    def keys(self) -> int:
        return self.states + align(8 * self.blocks)

    @property
    def index(self) -> int:
        return self.keys + align(16 * self.blocks)

    @property
    def peers(self) -> int:
        return self.index + align(4 * WAYS * self.buckets)

    @property
    def deliveries(self) -> int:
        return self.peers + align(8 * peer_area.WORDS * peer_area.PEERS_MAX)

    @property
    def journal(self) -> int:
        return self.deliveries + align(8 * delivery_ring.WORDS * delivery_ring.DELIVERIES)

    @property
    def total(self) -> int:
        return self.journal + align(4 * journal.ENTRIES)


class Areas(NamedTuple):
    """The arrays of a mapped table.

    States: uint64 (blocks,); keys: uint64 (blocks, 2); entries of the index: uint32 (buckets, WAYS).
    """

    states: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.uint64]
    entries: npt.NDArray[np.uint32]
    peers: peer_area.PeerArea
    deliveries: delivery_ring.DeliveryRing
    journal: journal.Journal


def areas(mapped: mmap.mmap, layout: Layout) -> Areas:
    """Return the arrays of a table of `layout`, in its memory. Raises ValueError if it is shorter than that."""
    peers = np.frombuffer(mapped, np.uint64, peer_area.WORDS * peer_area.PEERS_MAX, layout.peers)
    rows = np.frombuffer(mapped, np.uint64, delivery_ring.WORDS * delivery_ring.DELIVERIES, layout.deliveries)
    return Areas(
        np.frombuffer(mapped, np.uint64, layout.blocks, layout.states),
        np.frombuffer(mapped, np.uint64, 2 * layout.blocks, layout.keys).reshape(-1, 2),
        np.frombuffer(mapped, np.uint32, WAYS * layout.buckets, layout.index).reshape(-1, WAYS),
        peer_area.PeerArea(peers.reshape(peer_area.PEERS_MAX, -1)),
        delivery_ring.DeliveryRing(
            np.frombuffer(mapped, np.uint64, 1, NEWEST_OFFSET), rows.reshape(delivery_ring.DELIVERIES, -1)
        ),
        journal.Journal(
            np.frombuffer(mapped, np.uint64, 1, CHANGES_OFFSET),
            np.frombuffer(mapped, np.uint32, journal.ENTRIES, layout.journal),
        ),
    )
