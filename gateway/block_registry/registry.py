"""What the block tables say about a prompt: who holds how much of it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import msgspec
import numpy as np

from gateway.block_registry.chain import Chain
from gateway.block_registry.chain_cache import ChainCache
from gateway.block_registry.fleet_state import FleetState, TableKind
from gateway.block_registry.held import Held, Reached
from gateway.block_registry.holder_index import HolderIndex, Lengths, places
from gateway.block_registry.table_feed import TableFeed
from gateway.block_registry.tables import Table
from gateway.token_ids import TokenIds
from transport.keys import Keys, root_key
from transport.table.group_look_up import GroupChain, held_tokens

KEY_CACHE_BYTES_MAX = 32 << 20
ROOTS_MAX = 4096
INDEX_TABLES_MIN = 8
"""From so many tables on the index is faster than asking each; below that it would only take memory."""
LISTED_MAX = 64
"""Replicas beyond which what each holds is worked out on request alone."""
ASKED_MAX = 64
"""Tables asked in a look-up while they are not in the index yet."""
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
    """Looks prompts up in the tables of a state. Belongs to one thread, as the tables do.

    From INDEX_TABLES_MIN tables on, those whose layers all need the whole prefix are looked up in one index.
    """

    def __init__(self, key_cache_bytes_max: int = KEY_CACHE_BYTES_MAX) -> None:
        self._chains = ChainCache(key_cache_bytes_max)
        self._index = HolderIndex()
        self._feed = TableFeed(self._index)
        self._kinds: tuple[TableKind, ...] = ()
        self._indexed: dict[int, _Indexed] = {}

    @property
    def index_keys(self) -> int:
        """How many keys are in the index."""
        return len(self._index)

    def keep_up(self, state: FleetState) -> bool:
        """Take into the index what changed, and a piece of a table that is coming: a few milliseconds of work.

        Return whether there is more to take in.
        """
        if state.kinds is not self._kinds:
            self._follow(state.kinds)
        self._feed.refresh()
        return self._feed.filling

    def look_again(self) -> None:
        """Something changed that the next look-up has to know of."""
        self._feed.look_again()

    def look_up(self, state: FleetState, ids: Sequence[int], salt: str = "", lora: str = "") -> LookUp:
        """Find out who holds how much of a prompt. The chain is hashed once per distinct fingerprint, block size and hash.

        The last token is always computed, so a block that ends with it does not count.
        """
        if not isinstance(ids, TokenIds):
            ids = TokenIds.of(ids)
        self.keep_up(state)
        tokens = max(0, len(ids) - 1)
        chains: list[tuple[Chain, int]] = []
        blocks: Mapping[str, int] = {}
        tiers: Mapping[str, tuple[str, int]] = {}
        most = 0
        divisible = True
        for place, kind in enumerate(state.kinds):
            block_size = kind.block_size
            root = _root_key(kind.fingerprint, salt, lora, kind.hash_name)
            chain = self._chains.chain(root, ids, tokens // block_size, block_size, kind.hash_name)
            chains.append((chain, block_size))
            if not chain.blocks:
                continue
            indexed = self._indexed.get(place)
            held, reached, longest = _asked(kind, chain) if indexed is None else self._found(kind, indexed, chain.words)
            if longest:
                divisible = divisible and kind.plain
                blocks = {**blocks, **held} if blocks else held
                tiers = {**tiers, **reached} if tiers else reached
                most = max(most, longest * block_size)
        return LookUp(blocks, state.places, tuple(chains), most, divisible, tiers)

    def _follow(self, kinds: tuple[TableKind, ...]) -> None:
        """Have the tables of these kinds in the index, and no others."""
        self._kinds = kinds
        wanted = {place: kind for place, kind in enumerate(kinds) if kind.plain and len(kind.tables) >= INDEX_TABLES_MIN}
        tables: dict[str, Table] = {}
        for kind in wanted.values():
            tables |= kind.tables
            for sources in kind.tiers.values():
                tables |= sources
        self._feed.follow(tables)
        place_of = self._feed.place
        self._indexed = {
            place: _Indexed(
                sum(1 << place_of(name) for name in kind.tables),
                {name: sum(1 << place_of(source) for source in sources) for name, sources in kind.tiers.items()},
            )
            for place, kind in wanted.items()
        }

    def _found(
        self, kind: TableKind, indexed: "_Indexed", words: memoryview
    ) -> tuple[Mapping[str, int], Mapping[str, tuple[str, int]], int]:
        """Return what the index says; tables that are not in it yet are asked themselves."""
        feed, whole = self._feed, self._feed.whole
        lengths = self._index.lengths(words, indexed.tables & whole)
        longest = lengths[0][1] if lengths else 0
        missing = indexed.tables & ~whole
        held: Mapping[str, int]
        if missing or len(kind.tables) <= LISTED_MAX:
            listed = {feed.names[place]: blocks for bits, blocks in lengths for place in places(bits)}
            for place in islice(places(missing), ASKED_MAX):
                blocks = kind.tables[feed.names[place]].held_blocks(words)
                if blocks:
                    listed[feed.names[place]] = blocks
                    longest = max(longest, blocks)
            held = listed
        else:
            held = Held(lengths, feed.names, feed.place)
        if not indexed.tiers:
            return held, {}, longest
        reach = _Reach(self._index, feed, words, indexed.tiers, held)
        reached: Mapping[str, tuple[str, int]] = Reached(indexed.tiers, reach.of)
        if len(kind.tables) <= LISTED_MAX:
            reached = dict(reached)
            return held, reached, max([longest, *(blocks for _, blocks in reached.values())])
        return held, reached, max(longest, reach.most(longest))


class _Indexed(NamedTuple):
    """A kind's tables as bits of the index, and for each replica its tiers."""

    tables: int
    tiers: dict[str, int]


class _Reach:
    """How far tiers bring replicas; looked up once for each length that a replica holds."""

    def __init__(
        self, index: HolderIndex, feed: TableFeed, words: memoryview, tiers: Mapping[str, int], held: Mapping[str, int]
    ) -> None:
        self._index, self._feed, self._words, self._tiers, self._held = index, feed, words, tiers, held
        self._all = 0
        for bits in tiers.values():
            self._all |= bits
        self._known: dict[int, Lengths] = {}

    def of(self, replica: str) -> tuple[str, int]:
        """Return the tier that gives most to a replica, "" for none, and how many leading blocks that makes."""
        allowed = self._tiers[replica]
        for bits, blocks in self._lengths(self._held.get(replica, 0)):
            if bits & allowed:
                return self._feed.names[next(places(bits & allowed))], blocks
        return "", 0

    def most(self, begin: int) -> int:
        """Return how far tiers bring one that holds `begin` blocks, or none."""
        return max((lengths[0][1] for lengths in (self._lengths(begin), self._lengths(0)) if lengths), default=0)

    def _lengths(self, begin: int) -> Lengths:
        found = self._known.get(begin)
        if found is None:
            found = self._known[begin] = self._index.lengths(self._words, self._all & self._feed.whole, begin)
        return found


def _asked(kind: TableKind, chain: Chain) -> tuple[dict[str, int], dict[str, tuple[str, int]], int]:
    """Ask every table of a kind."""
    words, block_size = chain.words, kind.block_size
    groups = None if kind.plain else GroupChain(kind.groups, chain.keys)
    blocks: dict[str, int] = {}
    tiers: dict[str, tuple[str, int]] = {}
    longest = 0
    for name, table in kind.tables.items():
        held = table.held_blocks(words) if groups is None else held_tokens(table, groups) // block_size
        if held:
            blocks[name] = held
            longest = max(longest, held)
    for name, sources in kind.tiers.items():
        tier, reached = _best_tier(sources, words, groups, blocks.get(name, 0), block_size)
        if tier:
            tiers[name] = (tier, reached)
            longest = max(longest, reached)
    return blocks, tiers, longest


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
