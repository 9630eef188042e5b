"""Chains of keys; parts that were hashed before are looked up."""

from collections import OrderedDict
from typing import NamedTuple

from gateway.block_registry.chain import EMPTY, Chain
from gateway.token_ids import TokenIds
from transport.keys import HASHES, KEY_BYTES, hash_blocks

SECTION_BLOCKS = 64
SHORT_BLOCKS = 16
ENTRY_BYTES = 260
"""Measured size of an entry without its bytes: the objects, and its place in an ordered dictionary."""


class _Hashed(NamedTuple):
    """The keys of the full blocks of some tokens, the last key (or the one before), and the tokens that fill no block."""

    keys: bytes
    last: bytes
    rest: bytes


class ChainCache:
    """Keys of token ids seen before; the least recently used are dropped first. Belongs to one thread.

    Ids with a serial are found by it, together with the key before them and the tokens after that key that filled no block.
    Others are found in sections of 64 blocks, then of 16, by the hash of the preceding key and their token ids: as certain as
    the keys, which use the same hash. Hashing once per section instead of once per block takes a tenth of the time.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._hashed: OrderedDict[bytes, _Hashed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashed)

    def chain(self, root: bytes, ids: TokenIds, blocks: int, block_size: int, hash_name: str) -> Chain:
        """Return the keys of the first `blocks` blocks of `ids`, which must be that long."""
        if not blocks:
            return EMPTY
        left = blocks * block_size * 4
        if blocks < SHORT_BLOCKS:
            return Chain(hash_blocks(root, ids.raw[:left], block_size, hash_name))
        parts = ids.parts
        found: list[bytes] = []
        last, rest, place = root, b"", 0
        if len(parts) > 1 and len(parts[0]) < block_size and not parts[0].serial:  # the beginning of every text
            rest, place = parts[0].raw, 1
            left -= len(rest)
        while place < len(parts) and parts[place].serial and 4 * len(parts[place]) <= left:
            keys, last, rest = self._of_part(last, rest, parts[place], block_size, hash_name)
            found.append(keys)
            left -= 4 * len(parts[place])
            place += 1
        left += len(rest)
        raw = b"".join([rest, *[part.raw for part in parts[place:]]])[:left]
        start = 0
        for section_blocks in (SECTION_BLOCKS, SHORT_BLOCKS):
            width = section_blocks * block_size * 4
            while len(raw) - start >= width:
                keys, last, _ = self._of_section(last, raw[start : start + width], block_size, hash_name)
                found.append(keys)
                start += width
        found.append(hash_blocks(last, raw[start:], block_size, hash_name))
        while self._bytes > self._bytes_max:
            self._bytes -= _size(*self._hashed.popitem(last=False))
        return Chain(b"".join(found))

    def _of_part(self, last: bytes, rest: bytes, part: TokenIds, block_size: int, hash_name: str) -> _Hashed:
        name = b"".join((last, block_size.to_bytes(4, "little"), part.serial, rest))
        known = self._hashed.get(name)
        if known is not None:
            self._hashed.move_to_end(name)
            return known
        raw = rest + part.raw
        whole = len(raw) - len(raw) % (4 * block_size)
        keys = hash_blocks(last, raw[:whole], block_size, hash_name)
        return self._keep(name, _Hashed(keys, keys[-KEY_BYTES:] or last, raw[whole:]))

    def _of_section(self, last: bytes, section: bytes, block_size: int, hash_name: str) -> _Hashed:
        name = HASHES[hash_name](last + section)
        known = self._hashed.get(name)
        # as many bytes may be more blocks of a smaller size
        if known is not None and len(known.keys) * block_size * 4 == len(section) * KEY_BYTES:
            self._hashed.move_to_end(name)
            return known
        keys = hash_blocks(last, section, block_size, hash_name)
        return self._keep(name, _Hashed(keys, keys[-KEY_BYTES:], b""))

    def _keep(self, name: bytes, hashed: _Hashed) -> _Hashed:
        former = self._hashed.pop(name, None)
        if former is not None:
            self._bytes -= _size(name, former)
        self._hashed[name] = hashed
        self._bytes += _size(name, hashed)
        return hashed


def _size(name: bytes, hashed: _Hashed) -> int:
    """In bytes; names and rests are as long as a block's ids."""
    return ENTRY_BYTES + len(hashed.keys) + len(name) + len(hashed.rest)
