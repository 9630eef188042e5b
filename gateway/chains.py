"""Chains of keys, of which the parts that were hashed before are looked up."""

from collections import OrderedDict

from gateway.chain import EMPTY, Chain
from gateway.token_ids import TokenIds
from transport.keys import HASHES, KEY_BYTES, hash_blocks

SECTION_BLOCKS = 64
SECTION_BYTES = SECTION_BLOCKS * KEY_BYTES + 160
"""What a section takes, measured: its keys, its name, and its place in an ordered dictionary."""


class ChainCache:
    """Keys of sections of 64 blocks, the least recently used out first. Belongs to one thread.

    A section is known by the hash of the key before it and its token ids: as certain as the keys themselves, which are made
    by the same hash. What is hashed once a section instead of once a block takes a tenth of the time.
    """

    def __init__(self, bytes_max: int) -> None:
        self._sections_max = bytes_max // SECTION_BYTES
        self._sections: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sections)

    def chain(self, root: bytes, ids: TokenIds, blocks: int, block_size: int, hash_name: str) -> Chain:
        """Return the keys of the first `blocks` blocks of `ids`, of which there have to be so many."""
        if not blocks:
            return EMPTY
        hash_, sections, raw = HASHES[hash_name], self._sections, ids.raw
        width, end = SECTION_BLOCKS * block_size * 4, blocks * block_size * 4
        last, parts = root, []
        for start in range(0, end, width):
            section = raw[start : min(start + width, end)]
            if len(section) < width:
                parts.append(hash_blocks(last, section, block_size, hash_name))
                break
            name = hash_(last + section)
            known = sections.get(name)
            if known is None:
                known = sections[name] = hash_blocks(last, section, block_size, hash_name)
            else:
                sections.move_to_end(name)
            parts.append(known)
            last = known[-KEY_BYTES:]
        while len(sections) > self._sections_max:
            sections.popitem(last=False)
        return Chain(b"".join(parts))
