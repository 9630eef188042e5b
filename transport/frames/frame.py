"""A frame: one KV block of one tensor-parallel rank, complete in itself. Numbers are little-endian.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | magic, `PKVF` |
| 4 | 1 | version, 1 |
| 5 | 1 | codec (`codecs.NUMBERS`) |
| 6 | 1 | flags: 1 the block lost something, by this codec or before; 2 encrypted |
| 7 | 1 | 0 |
| 8 | 16 | fingerprint: everything that changes KV bytes, rank included |
| 24 | 16 | key of the block, its group's mask laid over it |
| 40 | 2 | KV cache group |
| 42 | 2 | mark of the tenant that it is of, 0: not known |
| 44 | 4 | tokens of the sequence that are known to come before the block |
| 48 | 4 | s, bytes of the shape, at most 65,536 |
| 52 | 8 | p, bytes of the payload |
| 60 | s | shape: below |
| 60 + s | p | payload: the codec's scales and codes; encrypted: nonce (12), ciphertext, tag (16), all before it authenticated |
| 60 + s + p | 16 | xxh3-128 of all bytes before |

A shape is its runs: cells (4), parts (1), then the parts: role, number, axes (1 each), then the axes: kind (1), size (4).

The checksum finds damage, not malice: against those who may write to where frames are kept, encrypt.
"""

import struct
from dataclasses import dataclass

import xxhash

from transport.frames import encryption
from transport.frames.codec import Block, Codec, Quality
from transport.frames.codecs import numbered
from transport.frames.errors import ForeignFrame, FrameDamaged, FrameLocked, FrameNotRead
from transport.frames.shape import BLOCK_BYTES_MAX, Bytes, Shape, unpacked
from transport.table.quality import TENANT_MARK_MAX

MAGIC = b"PKVF"
VERSION = 1
CHECKSUM_BYTES = 16
SHAPE_BYTES_MAX = 1 << 16
_HEADER = struct.Struct("<4sBBBB16s16sHHIIQ")
HEADER_BYTES = _HEADER.size
_LOSSY, _ENCRYPTED = 1, 2


@dataclass(frozen=True, slots=True)
class Header:
    """What a frame says it is."""

    codec: Codec
    encrypted: bool
    fingerprint: bytes
    key: bytes
    group: int
    position: int
    shape: Shape
    tenant: int
    """The mark of the tenant that the block is of (transport/table/quality.py): it says whose room the frame takes, no more."""
    quality: Quality
    """The class of the block that comes out: LOSSY also if it had lost something before it came to an exact codec."""


def write(
    codec: Codec,
    block: Block,
    *,
    fingerprint: bytes,
    key: bytes,
    group: int = 0,
    secret: bytes | None = None,
    lossy: bool = False,
    tenant: int = 0,
) -> bytes:
    """Return a block as a frame, encrypted if there is a `secret`; fingerprint and key are 16 bytes each.

    `lossy`: the block came out of a codec with loss before.

    Raises NotCoded if the codec does not take such a block, ImportError for a secret without the package `cryptography`.
    """
    payload = codec.encode(block)
    about = (fingerprint, key, group, tenant, block.position)
    return _written(codec, payload, block.shape, about, secret, lossy=lossy)


def write_payload(
    codec: Codec,
    payload: Bytes,
    shape: Shape,
    *,
    fingerprint: bytes,
    key: bytes,
    group: int = 0,
    secret: bytes | None = None,
    tenant: int = 0,
    position: int = 0,
) -> bytes:
    """Return as a frame what a codec made of a block before. Raises ImportError as `write` does."""
    return _written(codec, payload.data, shape, (fingerprint, key, group, tenant, position), secret)


def _written(
    codec: Codec,
    payload: bytes | memoryview,
    shape: Shape,
    about: tuple[bytes, bytes, int, int, int],
    secret: bytes | None,
    *,
    lossy: bool = False,
) -> bytes:
    flags = (_LOSSY if lossy or codec.quality is Quality.LOSSY else 0) | (_ENCRYPTED if secret is not None else 0)
    packed = shape.packed
    size = len(payload) + (encryption.EXTRA_BYTES if secret is not None else 0)
    header = _HEADER.pack(MAGIC, VERSION, codec.number, flags, 0, *about, len(packed), size) + packed
    if secret is not None:
        payload = encryption.seal(payload, secret, header)
    digest = xxhash.xxh3_128(header)
    digest.update(payload)
    return b"".join((header, payload, digest.digest()))


def frame_bytes(start: bytes | memoryview) -> int:
    """Return how long the frame is that begins with `start`, at least `HEADER_BYTES` long. Nothing else is checked.

    Raises FrameDamaged if no frame begins there, FrameNotRead if one of another version does.
    """
    *_, shape_bytes, payload_bytes = _fixed(memoryview(start))
    return HEADER_BYTES + int(shape_bytes) + int(payload_bytes) + CHECKSUM_BYTES


def read_header(data: bytes | memoryview) -> Header:
    """Return what a whole frame says it is, its checksum verified. Raises FrameDamaged, FrameNotRead."""
    return _read(memoryview(data))[0]


def read_into(
    out: Bytes,
    data: bytes | memoryview,
    *,
    fingerprint: bytes,
    key: bytes,
    shape: Shape,
    group: int = 0,
    secret: bytes | None = None,
) -> Header:
    """Decode a frame into `out` (shape.nbytes,), contiguous uint8, and return what it was.

    `out` may have been written to when this raises: FrameDamaged, FrameNotRead, ForeignFrame if the frame is of anything else
    than asked for, FrameLocked if it is encrypted and there is no or another `secret`, or the other way round.
    """
    header, packed, payload = _read(memoryview(data))
    for name, said, asked in (
        ("fingerprint", header.fingerprint, fingerprint),
        ("key", header.key, key),
        ("KV cache group", header.group, group),
        ("shape", header.shape.packed, shape.packed),
    ):
        if said != asked:
            raise ForeignFrame(f"a frame of another {name}")
    if header.encrypted != (secret is not None):
        raise FrameLocked("an encrypted frame, and no key" if header.encrypted else "a frame that is not encrypted, and a key")
    if secret is not None:
        payload = encryption.unseal(payload, secret, bytes(packed))
    header.codec.decode(payload, shape, out)
    return header


def _fixed(data: memoryview) -> tuple[bytes, int, int, int, int, bytes, bytes, int, int, int, int, int]:
    """Unpack and check the fixed part."""
    if len(data) < HEADER_BYTES:
        raise FrameDamaged(f"{len(data)} bytes, less than a frame's header")
    fields = _HEADER.unpack_from(data)
    if fields[0] != MAGIC:
        raise FrameDamaged("no frame begins here")
    if fields[1] != VERSION:
        raise FrameNotRead(f"a frame of version {fields[1]}; this release reads version {VERSION}")
    if fields[10] > SHAPE_BYTES_MAX or fields[11] > 2 * BLOCK_BYTES_MAX:
        raise FrameDamaged(f"a frame with a shape of {fields[10]} bytes and a payload of {fields[11]}")
    return fields


def _read(data: memoryview) -> tuple[Header, memoryview, memoryview]:
    """Return the header, its bytes and the payload of a whole frame."""
    _, _, number, flags, zero, fingerprint, key, group, tenant, position, shape_bytes, payload_bytes = _fixed(data)
    begin, end = HEADER_BYTES + shape_bytes, HEADER_BYTES + shape_bytes + payload_bytes
    if len(data) != end + CHECKSUM_BYTES:
        raise FrameDamaged(f"{len(data)} bytes in place of {end + CHECKSUM_BYTES}")
    if xxhash.xxh3_128_digest(data[:end]) != data[end:]:
        raise FrameDamaged("a frame that does not match its checksum")
    codec = numbered(number)
    lossy = bool(flags & _LOSSY)
    if zero or tenant > TENANT_MARK_MAX or flags & ~(_ENCRYPTED | _LOSSY) or lossy < (codec.quality is Quality.LOSSY):
        raise FrameDamaged(f"a frame of codec {codec.name} with flags {flags}")
    shape = unpacked(bytes(data[HEADER_BYTES:begin]))
    quality = Quality.LOSSY if lossy else Quality.EXACT
    header = Header(codec, bool(flags & _ENCRYPTED), fingerprint, key, group, position, shape, tenant, quality)
    return header, data[:begin], data[begin:end]
