"""Keys of KV blocks: a hash chain over the token ids of a sequence.

    key[i] = hash(key[i-1] || tokens of block i as little-endian int32 || extra content of block i)

`key[-1]` is the root, made of the fingerprint of everything that changes KV bytes, the tenant's salt and the LoRA adapter, so
that equal keys mean equal KV. Only full blocks have keys. xxh3_128 is fast and not collision resistant: choose sha256 (cut to
128 bits) where the registry is shared with people you do not trust.

In a table the key of a block says its group too: a block of the group's ends where key i does, and stands under key i with the
group's mask laid over it. The first group's mask is 0: a model of one group has the chain's own keys.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from transport.groups import GROUPS_MAX
from transport.int32 import int32_bytes

KEY_BYTES = 16
Keys = npt.NDArray[np.uint64]
"""Keys as an array of shape (n, 2) and dtype uint64: row i is the 16 bytes of key i."""

Hash = Callable[[bytes], bytes]


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:KEY_BYTES]


HASHES: Mapping[str, Hash] = {"xxh3_128": xxhash.xxh3_128_digest, "sha256": _sha256}
HASH_NAMES = tuple(HASHES)


def _mask(group: int) -> bytes:
    return xxhash.xxh3_128_digest(b"peerkv-group %d" % group) if group else bytes(KEY_BYTES)


_MASKS = np.frombuffer(b"".join(map(_mask, range(GROUPS_MAX))), dtype="<u8").reshape(GROUPS_MAX, 2)


def group_keys(keys: Keys, group: int, ratio: int = 1) -> Keys:
    """Return the keys of a group's blocks, each of which holds the tokens of `ratio` keys of the chain; full blocks only.

    Raises IndexError for a group beyond GROUPS_MAX.
    """
    if not group and ratio == 1:
        return keys
    masked: Keys = keys[ratio - 1 :: ratio] ^ _MASKS[group]
    return masked


def root_key(fingerprint: bytes, salt: str = "", lora: str = "", hash_name: str = "xxh3_128") -> bytes:
    """Return the 16 bytes that the chain of a sequence starts from.

    `salt` separates tenants, `lora` names the adapter ("" for none). Raises KeyError for an unknown `hash_name`.
    """
    parts = [fingerprint, salt.encode("utf-8", "surrogatepass"), lora.encode("utf-8", "surrogatepass")]
    data = b"peerkv-root" + b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return HASHES[hash_name](data)


def hash_blocks(last: bytes, raw: bytes, block_size: int, hash_name: str = "xxh3_128") -> bytes:
    """Return the keys, 16 bytes each, of the full blocks in `raw`, token ids as little-endian int32, that follow key `last`."""
    hash_, width = HASHES[hash_name], block_size * 4
    full = raw[: len(raw) - len(raw) % width]
    return b"".join([last := hash_(last + block) for (block,) in struct.iter_unpack(f"{width}s", full)])


def as_keys(data: bytes) -> Keys:
    """Return keys of 16 bytes each as an array that cannot be written to."""
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)


class KeyChain:
    """The keys of one token sequence, extended as it grows.

    `block_size` is in tokens. Tokens that do not fill a block are kept until later ones do.
    """

    __slots__ = ("_block_size", "_data", "_hash_name", "_last", "_rest", "blocks")

    def __init__(self, root: bytes, block_size: int, hash_name: str = "xxh3_128") -> None:
        self._hash_name = hash_name
        self._block_size = block_size
        self._last = root
        self._data = bytearray()
        self._rest = b""
        self.blocks = 0

    @property
    def tokens(self) -> int:
        """Tokens taken in so far, in full blocks and beyond."""
        return self.blocks * self._block_size + len(self._rest) // 4

    @property
    def keys(self) -> Keys:
        """The keys of all full blocks so far, shape (blocks, 2), dtype uint64: a copy."""
        return as_keys(bytes(self._data))

    def extend(self, tokens: Sequence[int], extras: Mapping[int, bytes] | None = None) -> None:
        """Take in further token ids; `extras` maps a block's index to what else its KV depends on (images, say).

        Raises OverflowError for an id outside int32 and TypeError for one that is no integer.
        """
        raw = self._rest + int32_bytes(tokens)
        width = self._block_size * 4
        full = len(raw) - len(raw) % width
        hash_, last, data = HASHES[self._hash_name], self._last, self._data
        if extras:
            for start in range(0, full, width):
                last = hash_(last + raw[start : start + width] + extras.get(self.blocks + start // width, b""))
                data += last
        elif full:
            fresh = hash_blocks(last, raw, self._block_size, self._hash_name)
            data += fresh
            last = fresh[-KEY_BYTES:]
        self.blocks += full // width
        self._last = last
        self._rest = raw[full:]


def chain_keys(root: bytes, tokens: Sequence[int], block_size: int, hash_name: str = "xxh3_128") -> Keys:
    """Return the keys of all full blocks of `tokens`, shape (len(tokens) // block_size, 2), dtype uint64."""
    chain = KeyChain(root, block_size, hash_name)
    chain.extend(tokens)
    return chain.keys
