"""Without known chains of block keys: every prompt is hashed as a whole."""

from gateway.block_registry.chain import EMPTY, Chain
from gateway.block_registry.chain_cache import ChainCache
from gateway.token_ids import TokenIds
from transport.keys import hash_blocks


def _chain(self: ChainCache, root: bytes, ids: TokenIds, blocks: int, block_size: int, hash_name: str) -> Chain:
    return Chain(hash_blocks(root, ids.raw[: blocks * block_size * 4], block_size, hash_name)) if blocks else EMPTY


ChainCache.chain = _chain  # type: ignore[method-assign]
