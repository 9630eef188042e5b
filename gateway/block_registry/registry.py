"""What the block tables say about a prompt: who holds how much of it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec
import numpy as np

from gateway.block_registry.chain import Chain
from gateway.block_registry.chain_cache import ChainCache
from gateway.block_registry.fleet_state import FleetState
from gateway.block_registry.tables import Table
from gateway.token_ids import TokenIds
from transport.keys import Keys, root_key
from transport.table.group_look_up import GroupChain, held_tokens

KEY_CACHE_BYTES_MAX = 32 << 20
ROOTS_MAX = 4096
_root_key = lru_cache(maxsize=ROOTS_MAX)(root_key)


class LookUp(msgspec.Struct, frozen=True):
    """What the tables say about a prompt: how many leading blocks each replica holds; those without any are omitted.

    `chains` are those that were looked up, with block sizes, `places` tells which of them is a replica's, for each with a live
    table whose hash is known; `held_tokens_max` are the tokens that somebody holds. `divisible`: of what is held any leading
    part can be supplied too, which windows and states do not allow. `tiers` names, for each replica to which a tier can give
    more than it holds, the tier that gives most, and how many leading blocks the replica has then.
    """

    blocks: Mapping[str, int]
    places: Mapping[str, int]
    chains: tuple[tuple[Chain, int], ...]
    held_tokens_max: int
    divisible: bool = True
    tiers: Mapping[str, tuple[str, int]] = {}


NOTHING = LookUp({}, {}, (), 0)


class Registry:
    """Looks prompts up in the tables of a state. Belongs to one thread, as the tables do."""

    def __init__(self, key_cache_bytes_max: int = KEY_CACHE_BYTES_MAX) -> None:
        self._chains = ChainCache(key_cache_bytes_max)

    def look_up(self, state: FleetState, ids: Sequence[int], salt: str = "", lora: str = "") -> LookUp:
        """Find out who holds how much of a prompt. The chain is hashed once per distinct fingerprint, block size and hash.

        The last token is always computed, so a block that ends with it does not count.
        """
        if not isinstance(ids, TokenIds):
            ids = TokenIds.of(ids)
        tokens = max(0, len(ids) - 1)
        chains: list[tuple[Chain, int]] = []
        blocks: dict[str, int] = {}
        most = 0
        divisible = True
        tiers: dict[str, tuple[str, int]] = {}
        for kind in state.kinds:
            block_size = kind.block_size
            root = _root_key(kind.fingerprint, salt, lora, kind.hash_name)
            chain = self._chains.chain(root, ids, tokens // block_size, block_size, kind.hash_name)
            chains.append((chain, block_size))
            if not chain.blocks:
                continue
            words = chain.words
            groups = None if kind.plain else GroupChain(kind.groups, chain.keys)
            for name, table in kind.tables.items():
                held = table.held_blocks(words) if groups is None else held_tokens(table, groups) // block_size
                if held:
                    blocks[name] = held
                    divisible = divisible and kind.plain
                    if held * block_size > most:
                        most = held * block_size
            for name, sources in kind.tiers.items():
                tier, reached = _best_tier(sources, words, groups, blocks.get(name, 0), block_size)
                if tier:
                    tiers[name] = (tier, reached)
                    divisible = divisible and kind.plain
                    most = max(most, reached * block_size)
        return LookUp(blocks, state.places, tuple(chains), most, divisible, tiers)


def _best_tier(
    tiers: Mapping[str, Table], words: memoryview, chain: GroupChain | None, begin: int, block_size: int
) -> tuple[str, int]:
    """Return the tier that gives most to a replica with the first `begin` blocks, "" for none, and how many that makes."""
    best, most = "", begin
    for name, tier in tiers.items():
        if chain is None:
            reached = begin + tier.held_blocks(words[2 * begin :])
        else:
            reached = held_tokens(tier, chain, begin * block_size) // block_size
        if reached > most:
            best, most = name, reached
    return best, most


def holders(tables: Mapping[str, Table], keys: Keys) -> list[list[str]]:
    """Return, for each key by itself, who holds that block now. `keys` has shape (n, 2)."""
    found: list[list[str]] = [[] for _ in range(len(keys))]
    words = Chain.of(keys).words
    for name, table in sorted(tables.items()):
        for row, names in enumerate(found):
            if table.holds(words[2 * row], words[2 * row + 1]):
                names.append(name)
    return found


def key_array(keys: Sequence[bytes]) -> Keys:
    """Return keys of 16 bytes each as an array of shape (n, 2)."""
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
