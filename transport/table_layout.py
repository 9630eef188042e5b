"""The bytes of a block table, agreed between its one writer and its readers.

| offset | what |
|---|---|
| 0 | fixed header: magic, version, sizes, epoch, flags (`HEADER`) |
| 64 | heartbeat: CLOCK_MONOTONIC nanoseconds of the owner's last step, uint64 |
| 72 | number of valid blocks, uint64 |
| 128 | counters, uint64 each, in the order of `COUNTERS` |
| 4096 | description: a JSON object (`Description`), padded |
| then | states: uint64 per block; odd while the content is not valid, even and never repeated while it is |
| then | keys: 16 bytes per block |
| then | index: `WAYS` uint32 per bucket, each a block id + 1 or 0; a hint, the block's own key decides |

All integers are little-endian, all arrays start at a multiple of 4096.
"""

import struct
from dataclasses import dataclass

import msgspec

MAGIC = b"PEERKV\x00\x01"
VERSION = 1
PAGE_BYTES = 4096
WAYS = 8
DESCRIPTION_BYTES_MAX = 4 << 20
BLOCKS_MAX = 1 << 28
HEARTBEAT_OFFSET = 64
VALID_OFFSET = 72
COUNTERS_OFFSET = 128
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
)
"""Counted by the owner's scheduler since its epoch began. A prompt's tokens are counted once, when it is first scheduled:
prompt_tokens = local_tokens + peer_tokens_* + computed_tokens. `check_failures` are blocks that changed under a copy,
`fallbacks` requests whose import failed and that computed instead, `evictions` published blocks that were reallocated."""

HEADER = struct.Struct("<8sIIQIIIII")  # magic, version, page, epoch, block size, blocks, buckets, ways, description bytes


class Region(msgspec.Struct, frozen=True):
    """One allocation that holds KV: `handle` is what the transport opens it by, `size` its bytes."""

    handle: str
    size: int


class Layer(msgspec.Struct, frozen=True):
    """Where a layer's blocks lie: block b is `bytes` bytes at `offset + b * stride` of region `region`."""

    region: int
    offset: int
    stride: int
    bytes: int


class Memory(msgspec.Struct, frozen=True):
    """The KV memory of one tensor-parallel rank, reachable through `transport`."""

    rank: int
    transport: str
    regions: tuple[Region, ...]
    layers: tuple[Layer, ...]


class Description(msgspec.Struct, frozen=True):
    """What a table says of its owner. `status` is "ok" or the reason why this replica does not exchange blocks."""

    replica: str
    pid: int
    hash_name: str
    transport: str
    status: str
    fingerprint: dict[str, str]
    memories: tuple[Memory, ...]


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
    def total(self) -> int:
        return self.index + align(4 * WAYS * self.buckets)
